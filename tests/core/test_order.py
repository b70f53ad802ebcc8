"""Which rows make which batch: every row once an epoch, found at any step at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlx.core.order import Order, share

orders = st.builds(
    Order,
    length=st.integers(1, 40),
    batch_size=st.integers(1, 17),
    seed=st.integers(0, 9),
    epochs=st.integers(1, 3),
)


@given(orders)
def test_every_row_comes_once_an_epoch_and_none_is_dropped(order):
    rows = [row for step in range(order.total_steps) for row in order.rows(step)]
    assert len(rows) == order.length * order.epochs == order.total_rows
    for epoch in range(order.epochs):
        assert sorted(rows[epoch * order.length : (epoch + 1) * order.length]) == list(range(order.length))


@given(orders, st.integers(0, 100))
def test_a_step_does_not_depend_on_those_before(order, step):
    step %= order.total_steps
    again = Order(order.length, order.batch_size, order.seed, epochs=order.epochs)
    assert again.rows(step) == order.rows(step)
    assert len(order.rows(step)) == order.batch_size or step == order.total_steps - 1


def test_data_in_its_order_and_shuffled_anew_each_epoch():
    plain = Order(5, 2, seed=0, shuffle=False, epochs=2)
    assert [plain.rows(step) for step in range(5)] == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    shuffled = Order(50, 50, seed=0, epochs=2)
    assert shuffled.rows(0) != shuffled.rows(1) != list(range(50))
    assert Order(50, 50, seed=1).rows(0) != shuffled.rows(0)


def test_max_steps_decides_over_epochs():
    order = Order(3, 2, seed=0, max_steps=4, epochs=9)
    assert order.total_steps == 4 and order.total_rows == 8 and len(order.rows(3)) == 2


def test_a_share_of_an_epoch_is_at_least_a_row():
    assert Order(100, 8, seed=0, epochs=0.001).total_rows == 1
    assert Order(100, 8, seed=0, epochs=0.5).total_rows == 50


@given(st.integers(0, 50), st.integers(1, 8))
def test_shares_part_the_rows_evenly(count, world):
    parts = [share(count, rank, world) for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
