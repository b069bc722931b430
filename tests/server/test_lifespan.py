"""An app that was shut down can be started again, as frameworks and test clients do."""

import pytest

from nanoflow_compiler.server.text import SHORT_CHARACTERS


@pytest.mark.anyio
async def test_long_texts_after_a_second_start(make_api):
    api = make_api()
    body = {"messages": [{"role": "user", "content": "a" * (SHORT_CHARACTERS + 1)}]}
    counts = []
    for _ in range(2):
        async with api.app.router.lifespan_context(api.app):
            counts.append((await api.post("/tokenize", body, status=200))["count"])
    assert counts[0] == counts[1] > 0
