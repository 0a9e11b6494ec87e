"""A SGLang that writes down what its scheduler saw and did; nothing else is changed.

Loaded by `sitecustomize` when the environment has CRITRATE_STEP_LOG: that file gets one line of JSON for
each event, in their order; instants are monotonic nanoseconds:

    arrival   t_ns, prompt tokens, max_tokens, ignore_eos
    step      t_ns, requests, tokens, running, waiting, free pages, retracted; as the batch was chosen
    end       t_ns, requests that finished; of the oldest step that has none yet
    aborted   t_ns, 1

An iteration that found nothing to run is a step without requests that ends at once. The scheduler asks
on and on while it is idle: the first two such iterations are written, the second of which shows what
an engine does that was idle before. A line is written when it happens, so that none is lost when the
process is ended.
"""

import json
import os
import time
from typing import Any

from critrate_hook import change_scheduler

IDLE_ITERATIONS = 2


class Log:
    """The file, opened by the process that has something to write."""

    def __init__(self) -> None:
        self.file: Any = None
        self.retracted = 0
        self.idle = IDLE_ITERATIONS

    def write(self, *event: Any) -> None:
        if self.file is None:
            self.file = open(os.environ["CRITRATE_STEP_LOG"], "a", buffering=1)  # noqa: SIM115
        self.file.write(json.dumps(event) + "\n")


def watch(scheduler: Any) -> None:
    """Wrap the methods of the class where requests come, steps are chosen, results are processed."""
    log = Log()
    queue = scheduler._add_request_to_queue
    choose = scheduler.get_next_batch_to_run
    process = scheduler.process_batch_result
    abort = scheduler.abort_request

    def add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
        if is_retracted:
            log.retracted += 1
        else:
            asked = req.sampling_params
            log.write(
                "arrival",
                time.monotonic_ns(),
                len(req.origin_input_ids),
                asked.max_new_tokens,
                int(asked.ignore_eos),
            )
        queue(self, req, is_retracted)

    def get_next_batch_to_run(self: Any, running_batch: Any, last_batch: Any) -> Any:
        start_ns = time.monotonic_ns()
        log.retracted = 0
        plan = choose(self, running_batch=running_batch, last_batch=last_batch)
        batch = plan.batch_to_run
        log.idle = 0 if batch else log.idle + 1
        if log.idle <= IDLE_ITERATIONS:
            chosen = batch.batch_size() if batch else 0
            prompts = bool(batch) and batch.forward_mode.is_extend()
            free = self.token_to_kv_pool_allocator.available_size()
            log.write(
                "step",
                start_ns,
                chosen,
                batch.extend_num_tokens if prompts else chosen,
                plan.running_batch.batch_size() + (chosen if prompts else 0),
                len(self.waiting_queue),
                (free + self.tree_cache.evictable_size()) // self.page_size,
                log.retracted,
            )
            if not batch:
                log.write("end", start_ns, 0)
        return plan

    def process_batch_result(self: Any, batch: Any, result: Any) -> None:
        before = sum(req.finished() for req in batch.reqs)
        process(self, batch, result)
        after = sum(req.finished() for req in batch.reqs)
        log.write("end", time.monotonic_ns(), after - before)

    def abort_request(self: Any, recv_req: Any) -> None:
        log.write("aborted", time.monotonic_ns(), 1)
        abort(self, recv_req)

    scheduler._add_request_to_queue = add_request_to_queue
    scheduler.get_next_batch_to_run = get_next_batch_to_run
    scheduler.process_batch_result = process_batch_result
    scheduler.abort_request = abort_request


change_scheduler(watch, "CRITRATE_STEP_LOG")
