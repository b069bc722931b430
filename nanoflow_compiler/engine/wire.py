"""Commands and events as bytes."""

from operator import index

import msgspec

from nanoflow_compiler.engine.messages import Command, Event

__all__ = ["decode_command", "decode_event", "encode"]

# Tokens may be integers of numpy.
encode = msgspec.msgpack.Encoder(enc_hook=index).encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
