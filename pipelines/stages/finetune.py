"""The stage that fine-tunes networks, which start from promising heads."""

from dataclasses import replace

from headrace.cache.count_text import count_text
from headrace.pipelines.finetune.stage import (
    FinetuneInputs,
    finetune_candidates,
    pending_candidates,
)
from headrace.pipelines.planning.devices import find_device
from headrace.pipelines.planning.leaderboard import rank_heads
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.stages.services import Services
from headrace.pipelines.stages.train import trained_heads


def finetune(state: RunState, services: Services) -> RunState:
    """Return the state with fine-tuned networks, if the recipe asks for them."""
    finetune_section, retry_failed = state.recipe.finetune, services.retry_failed
    if finetune_section is None:
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
        leaderboard = rank_heads(*trained_heads(state))
        missing_candidates = pending_candidates(
            finetune_inputs, leaderboard, finetune_section, retry_failed=retry_failed
        )
        finetuned = finetune_candidates(
            finetune_inputs,
            leaderboard,
            finetune_section,
            services.client() if missing_candidates else None,
            services.console,
            services.options,
            retry_failed=retry_failed,
        )
        trained_text = f"{count_text(finetuned.trained, 'network')} trained"
        report_done(trained_text if finetuned.trained else "nothing missing")
        return replace(state, finetuned=finetuned)
