"""Stop strings: where a growing text ends, also when a stop string spans several tokens."""

from pagellm.engine.sampling_params import SamplingParams


class StopChecker:
    """The text of one completion so far, cut at the first stop string."""

    def __init__(self, params: SamplingParams) -> None:
        self._stops = tuple(params.stop)
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._search_from = 0  # no stop string may begin before
        self.text = ""

    @property
    def safe_text(self) -> str:
        """The text without an end that may turn out to be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=0)
        for size in range(min(longest - 1, len(self.text) - self._search_from), 0, -1):
            if self.text.endswith(tuple(stop[:size] for stop in self._stops if len(stop) > size)):
                return self.text if self._include else self.text[:-size]
        return self.text

    def append(self, text: str, num_tokens: int) -> str | None:
        """Adds what the token number `num_tokens` gave; returns the stop string that this completed, if any.

        The one that begins first counts, the longest of those that begin together.
        """
        before = len(self.text)
        self.text += text
        if num_tokens <= self._min_tokens:
            self._search_from = len(self.text)
            return None
        found: tuple[int, int] | None = None
        for stop in self._stops:
            place = self.text.find(stop, max(self._search_from, before - len(stop) + 1))
            if place >= 0 and (found is None or (place, -len(stop)) < found):
                found = (place, -len(stop))
        if found is None:
            return None
        place, size = found[0], -found[1]
        stop = self.text[place : place + size]
        self.text = self.text[: place + size] if self._include else self.text[:place]
        return stop
