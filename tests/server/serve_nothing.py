"""Run as a program: serves on the given port until a signal; quick to start, for want of an engine."""

import asyncio
import sys
from types import SimpleNamespace

from nanoflow_compiler.server.run import serve
from nanoflow_compiler.server.settings import ServerSettings

engine = SimpleNamespace(model_name="none", max_model_len=8, tokenizer=None, errored=False)
asyncio.run(serve(engine, ServerSettings(port=int(sys.argv[1]))))
