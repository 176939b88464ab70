"""The choice of options that together free the most, against trying every set."""

import itertools
import random

import pytest
from lomem.conversion.choose import Option, choose, shares


def value(options, items, chosen):
    """Gain of a set, by definition."""
    gone = sum(size for size, parts in items if all(any(p in options[i].drops for i in chosen) for p in parts))
    return gone - sum(options[i].added for i in chosen)


def closed(options, chosen):
    """The set without options that lack what they need."""
    while True:
        kept = {i for i in chosen if options[i].needs <= chosen}
        if kept == chosen:
            return kept
        chosen = kept


def allowed(options, items, chosen):
    if closed(options, chosen) != chosen:
        return False
    total = value(options, items, chosen)
    return all(total - value(options, items, closed(options, chosen - {i})) > options[i].least for i in chosen)


def best(options, items):
    """The largest gain of all allowed sets, and the smallest rank of those that reach it."""
    every = (set(c) for n in range(len(options) + 1) for c in itertools.combinations(range(len(options)), n))
    good = [chosen for chosen in every if allowed(options, items, chosen)]
    most = max(value(options, items, chosen) for chosen in good)
    return most, min(sum(options[i].rank for i in c) for c in good if value(options, items, c) == most)


def drawn(seed, count):
    """Random options and items."""
    draw = random.Random(seed)
    items, parts = [], itertools.count()
    for _ in range(draw.randint(1, 2 * count)):
        items.append((draw.randint(0, 20), [next(parts) for _ in range(draw.randint(1, 3))]))
    names = [p for _, ps in items for p in ps]
    options = [
        Option(
            frozenset(draw.sample(names, min(len(names), draw.randint(0, 4)))),
            draw.randint(0, 10),
            draw.choice([0, 0, 0, 3]),
            draw.randint(0, 2),
            frozenset(draw.sample(range(i), 1) if i and draw.random() < 0.2 else []),
        )
        for i in range(count)
    ]
    return options, items


@pytest.mark.parametrize("seed", range(150))
def test_of_few_options_the_best_set_is_found(seed):
    options, items = drawn(seed, 1 + seed % 8)
    chosen = choose(options, items)
    assert allowed(options, items, chosen)
    assert (value(options, items, chosen), sum(options[i].rank for i in chosen)) == best(options, items)


@pytest.mark.parametrize("seed", range(150))
def test_shares_sum_to_what_is_brought(seed):
    options, items = drawn(seed, 1 + seed % 12)
    for chosen in (choose(options, items), set(range(len(options))), {0}):
        parts = shares(options, items, chosen)
        assert sum(parts) == value(options, items, chosen)
        assert all(part == 0 for i, part in enumerate(parts) if i not in chosen)


# Layers: each saves its input, and replaces what the next one saves.


def norms_in_a_row(count, sizes):
    options = [Option(frozenset({2 * i, 2 * i + 1, 2 * i + 2}), sizes[i + 1] + 1) for i in range(count)]
    items = [(sizes[i], [2 * i]) for i in range(count + 1)] + [(3, [2 * i + 1]) for i in range(count)]
    return options, items


def norms_and_activations(count, sizes):
    options, items = norms_in_a_row(count, sizes)
    options = [o if i % 2 else Option(frozenset({2 * i}), sizes[i] // 16, rank=9) for i, o in enumerate(options)]
    return options, items


def norms_of_one_input(count, sizes):
    options = [Option(frozenset({i}), 1) for i in range(count)]
    return options, [(sizes[0], range(count))]


def norms_of_one_input_and_of_another(count, sizes):
    options = [Option(frozenset({i, count + i}), 1 + sizes[i] // 2) for i in range(count)]
    return options, [(sizes[0], range(count)), *((sizes[i], [count + i]) for i in range(count))]


def calls_inside_calls(count, sizes):
    needs = [frozenset(range(i + 1, count)) for i in range(count)]
    return [Option(frozenset({i}), sizes[i + 1] // 2, needs=needs[i]) for i in range(count)], [
        (sizes[i], [i]) for i in range(count)
    ]


KINDS = [
    norms_in_a_row,
    norms_and_activations,
    norms_of_one_input,
    norms_of_one_input_and_of_another,
    calls_inside_calls,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_best_set_too_where_models_have_such(kind, seed):
    draw = random.Random(seed)
    sizes = [[64] * 40, [64, 32] * 20, [draw.choice([32, 64, 128]) for _ in range(40)]][seed % 3]
    options, items = kind(4 + seed, sizes)
    chosen = choose(options, items, exact=0)
    assert allowed(options, items, chosen)
    assert value(options, items, chosen) == best(options, items)[0]


@pytest.mark.parametrize("seed", range(40))
def test_no_small_step_leads_to_a_better_set_of_many(seed):
    options, items = drawn(seed, 30)
    chosen = choose(options, items, exact=0)
    assert allowed(options, items, chosen)
    total = value(options, items, chosen)
    assert total >= 0
    for i in range(len(options)):
        other = chosen ^ {i}
        assert not allowed(options, items, other) or value(options, items, other) <= total


def test_of_no_options_none_is_chosen():
    assert choose([], [(3, [0])]) == set()
    assert shares([], [(3, [0])], set()) == []


def test_of_equal_sets_the_one_of_the_smallest_rank_is_taken():
    items = [(10, [0])]
    for order in ([2, 0, 1], [0, 1, 2], [1, 2, 0]):
        options = [Option(frozenset({0}), 1, rank=rank) for rank in order]
        assert choose(options, items) == choose(options, items, exact=0) == {order.index(0)}


def test_a_hundred_that_depend_on_one_another():
    options, items = norms_of_one_input(100, [1000])
    assert choose(options, items) == set(range(100))
    options, items = norms_of_one_input(100, [99])  # not worth it
    assert choose(options, items) == set()
