"""A chat template and a packing given as transforms act after the others, wherever they stand in the list."""

import pytest

from rlx.core.data import check_data
from rlx.core.errors import ConfigError
from rlx.core.settings import Settings
from rlx.plugins.contract import Transform
from rlx.plugins.transforms.chat import ChatTemplate
from rlx.plugins.transforms.packing import Packing, Piece
from rlx.plugins.transforms.selection import Filter

TEXTS = [{"text": "ab" * n} for n in range(1, 14)]
TALK = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]


def load(tokenizer, transforms, rows=TEXTS, eats="demonstrations", **options):
    settings = Settings(**{"algo": "sft", "dataset": rows, "batch_size": 1, **options})
    return check_data(settings, tokenizer, transforms, eats=eats)[0]


def packing(**options):
    return Packing(Packing.Config(**options))


def template(**options):
    return ChatTemplate(ChatTemplate.Config(**options))


def ids(data):
    return [[one.ids for one in row] for row in data.documents]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_as_a_transform_is_packing_as_an_option(strategy, plain_tokenizer):
    by_option = load(plain_tokenizer, [], packing=True, packing_strategy=strategy, max_length=12)
    rest = Filter(Filter.Config(column="text"))
    for transforms in ([packing(strategy=strategy), rest], [rest, packing(strategy=strategy)]):
        assert ids(load(plain_tokenizer, transforms, max_length=12)) == ids(by_option)
    if strategy == "bfd_split":  # documents may be longer than rows
        shorter = load(plain_tokenizer, [packing(strategy=strategy, length=9)], max_length=12)
        nine = load(plain_tokenizer, [packing(strategy=strategy)], max_length=9)
        assert ids(shorter) == ids(nine) != ids(by_option)


def test_somebody_else_s_packing_takes_its_place(plain_tokenizer):
    class Twos(Transform):
        stage = "packing"
        splits = False

        def groups(self, lengths, longest):
            every = range(len(lengths))
            return [[Piece(i, 0, lengths[i]) for i in every[at : at + 2]] for at in every[::2]]

    data = load(plain_tokenizer, [Twos(None)])
    assert [len(row) for row in data.documents] == [2] * 6 + [1]
    loose = load(plain_tokenizer, [])
    assert [one for row in ids(data) for one in row] == [one for row in ids(loose) for one in row]


def test_a_template_as_a_transform_is_the_option(chat_tokenizer):
    jinja = "{% for m in messages %}({{ m.content }}){% endfor %}"
    by_option = load(chat_tokenizer, [], TALK, chat_template=jinja)
    given = load(chat_tokenizer, [template(template=jinja)], TALK)
    assert ids(given) == ids(by_option) != ids(load(chat_tokenizer, [], TALK))
    assert given.texts == ["(hi)(yes)"]


def test_a_stage_is_given_once(chat_tokenizer):
    cases = [
        ("transform packing and transform packing are both", [packing(), packing()], {}),
        ("transform packing and the option packing", [packing()], {"packing": True}),
        ("transform chat_template and the option chat_template", [template()], {"chat_template": "chatml"}),
        ("transform chat_template and transform chat_template", [template(), template()], {}),
    ]
    for message, transforms, options in cases:
        with pytest.raises(ConfigError, match=message):
            load(chat_tokenizer, transforms, **options)
    with pytest.raises(ConfigError, match="packs demonstrations, and there are none"):
        load(chat_tokenizer, [packing()], [{"prompt": "a"}], "prompts", algo="ppo")


def test_rows_are_not_packed_beyond_max_length(plain_tokenizer):
    with pytest.raises(ConfigError, match="longer than max_length") as error:
        load(plain_tokenizer, [packing(length=64)], max_length=40)
    assert error.value.hint == "--max-length 64"


def test_from_lengths_to_pieces():
    rows = [{"length": n} for n in (2, 3, 4)]
    assert packing(length=5)(rows, None) == [
        {"pieces": [Piece(0, 0, 2), Piece(1, 0, 3)]},
        {"pieces": [Piece(2, 0, 4)]},
    ]
