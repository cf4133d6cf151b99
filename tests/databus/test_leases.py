from hypothesis import given
from hypothesis import strategies as st

from databus.leases import Leases
from databus.prompts import Prompt

PROMPT = Prompt("", (1,), b"{}")

moves = st.tuples(
    st.sampled_from(["add", "expire", "drop"]),
    st.sampled_from("abcd"),
    st.sampled_from(["w0", "w1"]),
    st.integers(0, 9),
)


@given(st.lists(moves, max_size=30))
def test_what_a_worker_holds_is_what_was_given_and_not_taken(done: list[tuple[str, str, str, int]]) -> None:
    leases, model = Leases(lease_s=1.0), dict[str, tuple[str, int]]()
    for move, group_id, worker, predicted in done:
        if move == "add":
            leases.add(group_id, worker, PROMPT, 0.0, predicted)
            model[group_id] = (worker, predicted)
        else:
            (leases.expire if move == "expire" else leases.drop)(group_id)
            model.pop(group_id, None)
        for name in ("w0", "w1"):
            held = {group: tokens for group, (holder, tokens) in model.items() if holder == name}
            assert {each.group_id for each in leases.of(name)} == held.keys()
            assert leases.has_any(name) == bool(held)
            assert leases.predicted_tokens(name) == sum(held.values())
            assert leases.by_worker().get(name, 0) == len(held)
