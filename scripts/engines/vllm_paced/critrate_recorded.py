"""A vLLM that also writes down what its scheduler saw and did; nothing else is changed.

Loaded by `--scheduler-cls critrate_recorded.RecordedScheduler`. The file CRITRATE_STEP_LOG gets one line
of JSON for each event, in their order; instants are monotonic nanoseconds:

    arrival   t_ns, prompt tokens, max_tokens, ignore_eos
    step      t_ns, requests, tokens, running, waiting, free blocks, preempted; as `schedule` left them
    end       t_ns, requests that finished; of the oldest step that has none yet
    aborted   t_ns, requests that their clients gave up

A line is written when it happens, so that none is lost when the process is ended: 10 us of a step.
"""

import json
import os
import time

from critrate_paced import PacedScheduler


class RecordedScheduler(PacedScheduler):
    """vLLM's scheduler, paced and watched."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._events = open(os.environ["CRITRATE_STEP_LOG"], "a", buffering=1)  # noqa: SIM115

    def add_request(self, request):
        ignore_eos = int(request.sampling_params.ignore_eos)
        asked = (request.num_prompt_tokens, request.max_tokens, ignore_eos)
        self._write("arrival", time.monotonic_ns(), *asked)
        super().add_request(request)

    def schedule(self, *arguments, **options):
        start_ns = time.monotonic_ns()
        output = super().schedule(*arguments, **options)
        self._write(
            "step",
            start_ns,
            len(output.num_scheduled_tokens),
            output.total_num_scheduled_tokens,
            len(self.running),
            len(self.waiting),
            self.kv_cache_manager.block_pool.get_num_free_blocks(),
            len(output.preempted_req_ids),
        )
        return output

    def update_from_output(self, scheduler_output, model_runner_output):
        before = len(self.requests)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._write("end", time.monotonic_ns(), before - len(self.requests))
        return outputs

    def finish_requests(self, request_ids, finished_status):
        ended = super().finish_requests(request_ids, finished_status)
        if ended:
            self._write("aborted", time.monotonic_ns(), len(ended))
        return ended

    def _write(self, *event):
        self._events.write(json.dumps(event) + "\n")
