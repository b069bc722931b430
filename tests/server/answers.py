"""What tests read out of answers."""


def error_of(answer):
    assert answer.keys() == {"error"}
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]
    return answer["error"]


def text_of(answer, index=0):
    (choice,) = [choice for choice in answer["choices"] if choice["index"] == index]
    return choice["text"]


def joined(chunks, index=0):
    """The text of a stream of completions."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)
