"""A vLLM whose steps take a set time: the scheduler is vLLM's own, unchanged; the clock is held.

Loaded by `--scheduler-cls critrate_paced.PacedScheduler`; `critrate_pace` keeps the time.
"""

import vllm
from critrate_pace import Pace
from vllm.v1.core.sched.scheduler import Scheduler

WRITTEN_FOR = "0.32.0"

if vllm.__version__.split("+")[0] != WRITTEN_FOR:
    raise RuntimeError(
        f"the paced scheduler is written for vLLM {WRITTEN_FOR}, this is {vllm.__version__}: vLLM's "
        "scheduler interface is not public; use that version or leave server.launch.step_time out"
    )


class PacedScheduler(Scheduler):
    """vLLM's scheduler; a step lasts as long as the law says."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if self.scheduler_config.async_scheduling:
            raise RuntimeError(
                "the paced scheduler knows one step at a time: --no-async-scheduling"
            )
        self._pace = Pace()

    def schedule(self, *arguments, **options):
        self._pace.begin()
        output = super().schedule(*arguments, **options)
        counts = output.num_scheduled_tokens
        # The base class has counted this step's tokens as computed already.
        kv_tokens = sum(self.requests[request].num_computed_tokens for request in counts)
        self._pace.set(output.total_num_scheduled_tokens, kv_tokens, len(counts))
        return output

    def update_from_output(self, scheduler_output, model_runner_output):
        self._pace.hold()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self.has_unfinished_requests():
            self._pace.rest()
        return outputs
