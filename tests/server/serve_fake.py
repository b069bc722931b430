"""Run as a program: serves the fake engine; its arguments and the settings are JSON."""

import asyncio
import json
import logging
import sys

from nanoflow_compiler.server.run import serve
from nanoflow_compiler.server.settings import ServerSettings
from server.fake_engine import FakeEngine

engine, settings = (json.loads(argument) for argument in sys.argv[1:])
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
asyncio.run(serve(FakeEngine(**engine), ServerSettings(port=0, **settings)))
