from outsize.serve.text import Detokenizer


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode(errors="replace")


def pieces(text, stop=(), prompt=b"before"):
    subject = Detokenizer(Bytes(), list(prompt), stop)
    out = []
    for token in text.encode():
        out.append(subject.add(token))
        if subject.is_stopped:
            break
    return [*out, subject.finish()]


def test_text_comes_as_it_is_settled():
    assert pieces("abc") == ["a", "b", "c", ""]
    assert "".join(pieces("naïve 漢字 🙂")) == "naïve 漢字 🙂"
    assert all("�" not in piece for piece in pieces("漢字"))


def test_half_a_character_is_given_out_at_the_end():
    subject = Detokenizer(Bytes(), [], ())
    assert subject.add("漢".encode()[0]) == "" and subject.finish() == "�"


def test_a_stop_text_ends_it_and_is_not_given_out():
    assert "".join(pieces("one\n\nQ: two", ("\nQ:",))) == "one\n"
    assert pieces("ab", ("bc",)) == ["a", "", "b"]
    assert "".join(pieces("abab abc", ("abc",))) == "abab "
    assert "".join(pieces("xyz", ("z", "yz"))) == "x"
