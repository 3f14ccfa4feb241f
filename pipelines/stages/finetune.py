"""The stage that fine-tunes networks, which start from promising heads."""

from dataclasses import replace

from headrace.cache.count_text import count_text
from headrace.pipelines.finetune.stage import FinetuneInputs, finetune_candidates
from headrace.pipelines.planning.devices import find_device
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.stages.select import collect_heads, rank_heads
from headrace.pipelines.stages.services import Services


def finetune(state: RunState, services: Services) -> RunState:
    """Return the state with fine-tuned networks, if the recipe asks for them."""
    if state.recipe.finetune is None:
        return state
    with services.timed("finetune") as report_done:
        finetune_inputs = FinetuneInputs(
            paths=state.paths,
            task=state.dataset.train,
            metric=state.metric,
            feature_inputs=state.feature_inputs,
            images=state.samples,
            device=find_device(state.recipe.compute.device),
        )
        heads = collect_heads(state.paths.banks, state.plan, state.dataset.train.digest)
        finetuned = finetune_candidates(
            finetune_inputs,
            rank_heads(heads, state.metric, state.plan.input_widths, state.plan.n_folds),
            state.recipe.finetune,
            services.client,
            services.console,
            services.options,
            retry_failed=services.retry_failed,
        )
        report_done(f"{count_text(finetuned.trained, 'network')} trained")
        return replace(state, finetuned=finetuned)
