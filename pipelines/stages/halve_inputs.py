"""The stage that halves the inputs: only inputs that do well on a share of the images get heads."""

from collections.abc import Sequence
from dataclasses import replace

from headrace.heads.bank import BankJob
from headrace.heads.data.side_columns import taps_of
from headrace.pipelines.planning.plan import keep_inputs
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.selection.halving import halve_inputs as halve_candidate_inputs
from headrace.pipelines.selection.small_banks import train_banks
from headrace.pipelines.stages.services import Services


def halve_inputs(state: RunState, services: Services) -> RunState:
    """Return the state with heads on promising inputs only, if the recipe asks for halving."""
    halving_section = state.recipe.input_halving
    if halving_section is None:
        return state
    with services.timed("halve inputs") as report_done:

        def train_all(jobs: Sequence[BankJob]) -> None:
            if jobs:
                console, options, leases = services.console, services.options, state.paths.leases
                train_banks(jobs, services.client(), console, "halve inputs", leases, options)

        requested_inputs = list(
            dict.fromkeys(taps_of(head_request.inputs) for head_request in state.plan.requested)
        )
        halving = halve_candidate_inputs(
            requested_inputs,
            state.dataset.train,
            state.feature_paths,
            halving_section,
            state.paths.input_halving,
            train_all,
            state.dataset.groups,
        )
        report_done(
            f"{len(halving.selected_inputs):,} of {len(requested_inputs):,} inputs go "
            f"on: {'; '.join(' + '.join(inputs) for inputs in halving.selected_inputs)}"
        )
        return replace(
            state, plan=keep_inputs(state.plan, halving.selected_inputs), input_halving=halving
        )
