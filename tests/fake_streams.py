"""Streams without a GPU: they note what was issued on them, in which order the device could run it."""


class FakeEvent:
    def __init__(self):
        self.seen = None

    def record(self, stream):
        self.seen = dict(stream.seen)


class FakeStream:
    """``seen`` has, of each stream, how many of its launches are over before the next one here."""

    def __init__(self, name):
        self.name = name
        self.seen = {}
        self.num_launched = 0

    def wait_event(self, event):
        assert event.seen is not None, "it was never recorded"
        for name, count in event.seen.items():
            self.seen[name] = max(self.seen.get(name, 0), count)

    def launch(self):
        self.num_launched += 1
        self.seen[self.name] = self.num_launched
        return self.name, self.num_launched

    def runs_after(self, launched):
        name, number = launched
        return self.seen.get(name, 0) >= number

    def __repr__(self):
        return self.name


class FakeStreams:
    """In place of those of torch."""

    def __init__(self):
        self.home = self.at = FakeStream("home")
        self.num_events = 0

    def current(self):
        return self.at

    def make_current(self, stream):
        self.at = stream

    def new_event(self):
        self.num_events += 1
        return FakeEvent()

    def is_capturing(self):
        return False


class FakeSide:
    """Of a divided GPU."""

    def __init__(self, name, num_sms):
        self.name = name
        self.num_sms = num_sms

    def new_stream(self):
        return FakeStream(self.name)
