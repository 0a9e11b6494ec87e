"""The scheduler of vLLM v1.

The rules are those of vLLM 0.32.0 (`v1/core/sched/scheduler.py`, `v1/core/kv_cache_manager.py`) for
first-come-first-served order, prefix caching off, no speculation, no adapters:

* running requests are served first, in order of admission, from one token budget;
* when blocks run out the newest running request is preempted: its blocks are freed, its outputs are
  kept, it returns to the front of the queue and later recomputes prompt and outputs;
* nothing is admitted in a step that preempted; otherwise the queue is admitted from its head until
  budget, sequences or blocks run out;
* outputs are not reserved, the whole prompt is (``reserve_full_prompt``).

With ``async_scheduling`` step k+1 is scheduled when step k starts, before the tokens of step k are
known: an arrival waits one step more, and a finished request holds its blocks one step longer.
"""

from __future__ import annotations

from analysis.schedulers.engine import Engine, Request, Step


class VLLMEngine(Engine):
    """State of vLLM's scheduler; see the module's docstring for its rules."""

    def _schedule(self) -> Step | None:
        """Choose a step and allocate its blocks; None if there is nothing to run."""
        step = Step(self.steps_scheduled)
        budget = self.limits.max_num_batched_tokens or (1 << 62)
        threshold = self._prefill_threshold()
        budget = self._schedule_running(step, budget, threshold)
        if not step.preempted:
            self._schedule_waiting(step, budget, threshold)
        if not step.scheduled:
            return None
        self.steps_scheduled += 1
        self._advance(step)
        return step

    # -- the two halves of a step ----------------------------------------------------------------

    def _schedule_running(self, step: Step, budget: int, threshold: int) -> int:
        """Serve running requests in admission order, preempting the newest when blocks run out."""
        block_size = self.limits.block_size
        running = self.running
        position = 0
        while position < len(running) and budget > 0:
            request = running[position]
            position += 1
            # A request whose steps in flight reach its declared length is not run again.
            if request.in_flight and request.outputs + request.in_flight >= request.max_tokens:
                continue
            tokens = request.num_tokens + request.in_flight - request.computed
            if tokens <= 0:
                continue
            tokens = min(tokens, budget, threshold)
            needed = -(-(request.computed + tokens) // block_size) - request.blocks
            while needed > self.free_blocks:
                victim = running.pop()
                self._preempt(victim)
                step.preempted += 1
                if victim is request:
                    return budget
            self.free_blocks -= needed
            request.blocks += needed
            step.scheduled.append((request, tokens))
            budget -= tokens
        return budget

    def _schedule_waiting(self, step: Step, budget: int, threshold: int) -> None:
        """Admit from the head of the queue until budget, sequences or blocks run out."""
        limits = self.limits
        max_num_seqs = limits.max_num_seqs or (1 << 62)
        draining: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < max_num_seqs:
            request = self.waiting[0]
            if request.stale:
                # Its last token is still in flight; it is passed over for this step.
                draining.append(self.waiting.popleft())
                continue
            tokens = min(request.num_tokens, threshold, budget)
            whole = request.num_tokens if limits.reserve_full_prompt else tokens
            spare = limits.watermark_blocks if self.running else 0
            if -(-whole // limits.block_size) + spare > self.free_blocks:
                break
            self.waiting.popleft()
            needed = -(-tokens // limits.block_size)
            self.free_blocks -= needed
            request.blocks = needed
            request.state = "running"
            self.running.append(request)
            step.scheduled.append((request, tokens))
            budget -= tokens
        self.waiting.extendleft(reversed(draining))

    def _advance(self, step: Step) -> None:
        """Count the step's tokens as computed and note who will sample a token."""
        for request, tokens in step.scheduled:
            if request.preemptions and request.computed < request.num_tokens - 1:
                step.recomputed_tokens += tokens
            request.computed += tokens
            request.steps_in_flight += 1
            samples = request.computed == request.num_tokens + request.in_flight
            if samples:
                request.in_flight += 1
            step.samples.append(samples)
            step.tokens += tokens
            step.kv_tokens += request.computed
        self.recomputed_tokens += step.recomputed_tokens

    # -- small moves -----------------------------------------------------------------------------

    def _prefill_threshold(self) -> int:
        threshold = self.limits.long_prefill_token_threshold
        if threshold > 0 and len(self.running) + len(self.waiting) > 1:
            return threshold
        return 1 << 62

    def _preempt(self, request: Request) -> None:
        self._free(request)
        request.computed = 0
        # A synchronous engine has nothing in flight here; an asynchronous one delivers it late.
        request.stale = request.steps_in_flight
        request.in_flight = 0
        request.preemptions += 1
        request.state = "waiting"
        self.preemptions += 1
        self.waiting.appendleft(request)
