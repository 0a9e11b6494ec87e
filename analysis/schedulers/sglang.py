"""The scheduler of SGLang.

The rules are those of SGLang 0.5.23 (`srt/managers/scheduler.py`, `schedule_policy.py`,
`schedule_batch.py`) for first-come-first-served order, no speculation, no adapters, no mixed chunks,
and prompts that share no prefix: then what the radix cache keeps of finished requests is evictable and
counts as free.

* A step computes prompts *or* decodes. Prompts come first: nobody decodes while one can be admitted.
* A request is admitted when its prompt and its whole declared output fit beside what is set aside for
  the running ones: what each may still generate, times ``new_token_ratio`` (1 for requests that ignore
  the end of text). Without the radix cache, requests that ignore the end of text are admitted by
  looking ahead instead: the pool must not overflow at any of the coming completions.
* The first request that does not fit ends admission, until a request leaves the batch.
* ``new_token_ratio`` falls with each decode step and jumps up after a retraction; an idle engine
  resets it.
* When a decode step does not fit, the requests with the fewest outputs are retracted: they lose their
  KV, keep their outputs, and go to the *back* of the queue.

With ``async_scheduling`` (the overlap schedule) step k+1 is chosen when step k starts: admissions lag by
a step, and requests that step k ends at their declared length are not run again.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from analysis.schedulers.engine import Engine, EngineLimits, Request, SGLangRules, Step

INITIAL_RATIO = 0.7
"""``new_token_ratio`` of an idle engine, at a schedule_conservativeness of 1."""
MIN_RATIO_FACTOR = 0.14
RATIO_DECAY_STEPS = 600
RETRACT_DECODE_STEPS = 20
LOOK_AHEAD_SPARE = 1
"""Tokens per running request that looking ahead keeps free."""
UNBOUNDED = 1 << 62


class SGLangEngine(Engine):
    """State of SGLang's scheduler; see the module's docstring for its rules."""

    keeps_late_tokens = False

    def __init__(self, limits: EngineLimits) -> None:
        assert limits.sglang is not None
        super().__init__(limits)
        self.rules: SGLangRules = limits.sglang
        self.initial_ratio = min(INITIAL_RATIO * self.rules.schedule_conservativeness, 1.0)
        self.new_token_ratio: float = self.initial_ratio
        self.retracted_input_tokens = 0
        self.retracted_output_tokens = 0
        self.prefill_steps = 0
        self._decoding: list[Request] = []
        self._prefilled: list[Request] = []
        """Those of the last step if it was a prefill step: they join the batch before the next."""
        self._chunked: Request | None = None
        """The one request whose prompt is only partly computed."""
        self._full = False
        """Admission stays shut until a request leaves the batch."""

    def submit(self, request: Request) -> None:
        total, longest = request.prompt_tokens + request.max_tokens, longest_request(self.limits)
        if total > longest:
            raise ValueError(
                f"{total} declared tokens exceed the {longest} that a pool of "
                f"{self.limits.pool_tokens} always admits"
            )
        super().submit(request)

    def _schedule(self) -> Step | None:
        self._join_batch()
        step = Step(self.steps_scheduled)
        self._schedule_prompts(step)
        if step.scheduled:
            step.prefill = True
            self.prefill_steps += 1
            self._prefilled = [request for request, _ in step.scheduled]
        else:
            self._schedule_decodes(step)
        if not step.scheduled:
            if not self.running and not self.waiting:
                self.new_token_ratio = self.initial_ratio
            return None
        self.steps_scheduled += 1
        self._advance(step)
        return step

    # -- the batch -------------------------------------------------------------------------------

    def _join_batch(self) -> None:
        """Merge the last step's prompts into the batch and drop who has left it."""
        if self._chunked is not None and self._chunked.state != "running":
            self._chunked = None
        joined = [r for r in self._prefilled if r.state == "running" and r is not self._chunked]
        if len(joined) < len(self._prefilled):
            self._full = False
        if joined and not self._decoding:
            # The prefill batch takes the place of an empty one, with a flag of its own.
            self._full = False
        self._prefilled = []
        batch = [r for r in self._decoding + joined if r.state == "running"]
        if len(batch) < len(self._decoding) + len(joined):
            self._full = False
        self._decoding = batch

    def _schedule_decodes(self, step: Step) -> None:
        """One token for every request of the batch, retracting some when the pool is too small."""
        before = len(self._decoding)
        finishing = [
            r for r in self._decoding if r.in_flight and r.outputs + r.in_flight >= r.max_tokens
        ]
        if finishing:
            self._decoding = [r for r in self._decoding if r not in finishing]
        if finishing and self._pages_needed(self._decoding) > self.free_blocks:
            # What they hold comes back when the step in flight ends.
            self._full = False
            return
        if self._decoding:
            if self._pages_needed(self._decoding) > self.free_blocks:
                self._retract(step)
            else:
                decay = self.initial_ratio * (1 - MIN_RATIO_FACTOR) / RATIO_DECAY_STEPS
                least = self.initial_ratio * MIN_RATIO_FACTOR
                self.new_token_ratio = max(self.new_token_ratio - decay, least)
        if len(self._decoding) < before:
            self._full = False
        page = self.limits.block_size
        for request in self._decoding:
            if request.computed % page == 0:
                self.free_blocks -= 1
                request.blocks += 1
            step.scheduled.append((request, 1))

    def _pages_needed(self, batch: list[Request]) -> int:
        page = self.limits.block_size
        return len(batch) if page == 1 else sum(r.computed % page == 0 for r in batch)

    def _retract(self, step: Step) -> None:
        """Take requests with the fewest outputs out until the next step of the others fits."""
        order = sorted(self._decoding, key=lambda r: (r.outputs, -r.prompt_tokens), reverse=True)
        while len(order) > 1:
            victim = order.pop()
            self.retracted_input_tokens += victim.prompt_tokens
            self.retracted_output_tokens += victim.outputs
            self.running.remove(victim)
            self._free(victim)
            victim.computed = 0
            victim.stale = victim.steps_in_flight
            victim.in_flight = 0
            victim.preemptions += 1
            victim.state = "waiting"
            self.preemptions += 1
            step.preempted += 1
            self.waiting.append(victim)
            if self._pages_needed(order) <= self.free_blocks:
                break
        self._decoding = order
        generated = sum(r.outputs + RETRACT_DECODE_STEPS for r in order)
        declared = sum(r.max_tokens for r in order) + 1
        self.new_token_ratio = min(generated / declared, 1.0)

    # -- admission -------------------------------------------------------------------------------

    def _schedule_prompts(self, step: Step) -> None:
        """Go on with the chunked prompt, then admit from the head of the queue until one is refused."""
        if not self._decoding:
            self._full = False
        if (self._full or not self.waiting) and self._chunked is None:
            return
        rows = self.limits.max_num_seqs or UNBOUNDED
        free_rows = rows - len(self.running)
        if self._chunked is None and free_rows <= 0:
            self._full = True
            return
        budget = _Budget(self)
        if self._chunked is not None:
            self._resume(step, budget, self._chunked)
            free_rows += 1
        most = min(free_rows, rows - len(self._decoding))
        while self.waiting and not budget.spent:
            if self._full or len(budget.admitted) >= most:
                self._full = True
                break
            request = self.waiting[0]
            tokens = budget.admissible(request)
            if tokens is None:
                self._full = bool(budget.admitted or self._decoding)
                break
            if tokens == 0:
                break
            self.waiting.popleft()
            request.state = "running"
            self.running.append(request)
            self._take(step, budget, request, tokens)
            if not budget.has_room:
                self._full = True
                break

    def _resume(self, step: Step, budget: _Budget, request: Request) -> None:
        """Go on with a prompt that is partly computed."""
        rest = request.num_tokens - request.computed
        self._chunked = None
        self._take(step, budget, request, min(rest, budget.chunk_of_resumed()))

    def _take(self, step: Step, budget: _Budget, request: Request, tokens: int) -> None:
        """Compute some of a prompt in this step; outputs are set aside once it is whole."""
        whole = request.computed + tokens == request.num_tokens
        budget.charge(tokens, budget.clipped(request.max_tokens) if whole else 0)
        budget.admitted.append(request)
        if not whole:
            self._chunked = request
        pages = -(-(request.computed + tokens) // self.limits.block_size)
        self.free_blocks -= pages - request.blocks
        request.blocks = pages
        step.scheduled.append((request, tokens))

    def _advance(self, step: Step) -> None:
        """Count the step's tokens as computed and note who will sample a token."""
        for request, tokens in step.scheduled:
            if step.prefill and request.preemptions:
                step.recomputed_tokens += tokens
            request.computed += tokens
            request.steps_in_flight += 1
            samples = not step.prefill or request is not self._chunked
            if samples:
                request.in_flight += 1
            step.samples.append(samples)
            step.tokens += tokens
            step.kv_tokens += request.computed
        self.recomputed_tokens += step.recomputed_tokens


def longest_request(limits: EngineLimits) -> int:
    """Prompt and declared output, in tokens, that an empty pool admits whatever the prompt."""
    return limits.pool_tokens - 2 * limits.block_size - LOOK_AHEAD_SPARE


@dataclass(slots=True)
class _Upcoming:
    """A running request as looking ahead sees it: tokens it may still generate, tokens it has."""

    left: float
    occupied: int


class _Budget:
    """Room for prompts in one pass of admission (`PrefillAdder`)."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.rules, self.page = engine.rules, engine.limits.block_size
        self.ratio = engine.new_token_ratio
        self.available = engine.free_blocks * self.page
        self.batch = engine._decoding
        self.admitted: list[Request] = []
        self.set_aside = 0.0
        """Tokens taken by this pass and those that running requests may still generate."""
        self.taken = 0
        self.input_left = self.rules.max_prefill_tokens
        self.chunk_left = engine.limits.max_num_batched_tokens
        self.upcoming: list[_Upcoming] | None = None
        for r in self.batch:
            self.set_aside += self.clipped(r.max_tokens - r.outputs) * self._ratio_of(r)

    @property
    def has_room(self) -> bool:
        return self.available > self.set_aside and self.available > self.taken

    @property
    def spent(self) -> bool:
        """The pass may compute no more prompt tokens, though there may be room for them."""
        if not self.has_room:
            return False
        return self.input_left <= 0 or (self.chunk_left is not None and self.chunk_left <= 0)

    def clipped(self, tokens: int) -> int:
        return min(max(tokens, 0), self.rules.clip_max_new_tokens)

    def charge(self, tokens: int, new_tokens: int) -> None:
        paged = self._paged(tokens)
        self.set_aside += paged + self.page + new_tokens
        self.taken += paged + self.page
        self.input_left -= paged
        if self.chunk_left is not None:
            self.chunk_left -= paged

    def chunk_of_resumed(self) -> int:
        """What the chunked prompt may compute now: it always makes progress."""
        assert self.chunk_left is not None
        room = int(self.available - self.set_aside)
        return min(self.chunk_left, room) if room > 0 else self.chunk_left

    def admissible(self, request: Request) -> int | None:
        """Prompt tokens to compute of a waiting request; 0: not in this pass; None: no room."""
        tokens = request.num_tokens
        if request.ignore_eos and not self.rules.radix_cache:
            if not self._fits_ahead(request):
                return None
            if self.chunk_left is None or tokens <= self.chunk_left:
                return tokens
            return max(self.chunk_left, 0)
        new_tokens = self.clipped(request.max_tokens - request.outputs)
        if tokens + new_tokens + self.page >= self.available - self.set_aside:
            return None
        paged = self._paged(tokens)
        if self.chunk_left is None:
            return 0 if self.admitted and paged >= self.input_left else tokens
        if paged > self.chunk_left:
            return self.chunk_left // self.page * self.page
        return tokens

    def _fits_ahead(self, candidate: Request) -> bool:
        """Does the pool hold everybody at each of the coming completions, in order of completion?"""
        needed = self._paged(candidate.num_tokens) + self.page
        if needed > self.available - max(self.taken, self.set_aside):
            return False
        self._foresee(candidate)
        assert self.upcoming is not None
        free = self.available - self.taken - needed
        present = len(self.upcoming)
        for request in self.upcoming:
            if free - request.left * present <= LOOK_AHEAD_SPARE * present:
                return False
            free += request.occupied
            present -= 1
        return True

    def _foresee(self, candidate: Request) -> None:
        """Put the candidate among those whose completion is foreseen, the first time with all others."""
        if self.upcoming is None:
            known = (self._upcoming(r) for r in (candidate, *self.batch, *self.admitted))
            self.upcoming = sorted((u for u in known if u.left > 0), key=lambda u: u.left)
        else:
            new = self._upcoming(candidate)
            if new.left > 0:
                at = bisect_left(self.upcoming, new.left, key=lambda u: u.left)
                # The one that would come last is put before the last one.
                self.upcoming.insert(min(at, max(len(self.upcoming) - 1, 0)), new)

    def _upcoming(self, r: Request) -> _Upcoming:
        ratio = 1.0 if r.ignore_eos else self.ratio
        return _Upcoming(r.max_tokens * ratio - r.outputs, r.num_tokens)

    def _ratio_of(self, r: Request) -> float:
        return 1.0 if r.ignore_eos and self.rules.whole_output_of_ignore_eos else self.ratio

    def _paged(self, tokens: int) -> int:
        return -(-tokens // self.page) * self.page
