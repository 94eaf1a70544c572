"""Stop strings: where a growing text ends, also when a stop string spans several tokens.

All of a request's stop strings are looked for at once, by an automaton (Aho and Corasick 1975): a character
of text costs the same however many and however long they are.
"""

from array import array
from collections.abc import Iterator
from functools import lru_cache

from pagellm.engine.requests.sampling_params import SamplingParams


class StopAutomaton:
    """The trie of the stop strings, with a link from each node to the longest other one that ends like it.

    A node stands for the text that leads to it from node 0, and is the state of a search whose text ends with
    that much of a stop string, and with no more. A node's first child is the node after it, which takes an
    array; only further children need an entry each.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.depths = array("i", [0])  # characters that lead to the node
        self._first_child = array("i", [-1])  # the character to the node after, or -1
        self._branches: dict[tuple[int, int], int] = {}  # (node, character) to each further child
        self._stops = stops
        self._ends = array("i", [0])  # the number, from 1 on, of the stop string that ends here
        parents, characters = array("i", [0]), array("i", [-1])
        for number, stop in enumerate(stops, 1):
            node = 0
            for character in map(ord, stop):
                child = self._child(node, character)
                if child is None:
                    child = len(self.depths)
                    if child == node + 1:
                        self._first_child[node] = character
                    else:
                        self._branches[node, character] = child
                    self.depths.append(self.depths[node] + 1)
                    self._first_child.append(-1)
                    self._ends.append(0)
                    parents.append(node)
                    characters.append(character)
                node = child
            self._ends[node] = number
        self.links = array("i", [0]) * len(self.depths)
        # The longest stop string that a node's text ends with, as the node where it ends; 0 is none.
        self.found = array("i", [0]) * len(self.depths)
        for node in sorted(range(1, len(self.depths)), key=self.depths.__getitem__):
            parent = parents[node]
            link = self.step(self.links[parent], characters[node]) if parent else 0
            self.links[node] = link
            self.found[node] = node if self._ends[node] else self.found[link]

    def step(self, node: int, character: int) -> int:
        """The state after one more character, of which this is the code point."""
        while True:
            child = self._child(node, character)
            if child is not None:
                return child
            if node == 0:
                return 0
            node = self.links[node]

    def text_of(self, node: int) -> str:
        """The stop string that ends at a node."""
        return self._stops[self._ends[node] - 1]

    def _child(self, node: int, character: int) -> int | None:
        if self._first_child[node] == character:
            return node + 1
        return self._branches.get((node, character))


# Completions of one prompt, and requests that say the same, share it; it takes some 20 bytes a character.
_automaton = lru_cache(maxsize=64)(StopAutomaton)


class StopChecker:
    """The text of one completion so far, cut at the first stop string.

    Special tokens that are left out of the text are looked past, and also seen where they are: a stop string
    that contains one as a whole ends the text, too.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._automaton = _automaton(tuple(params.stop)) if params.stop else None
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self.text = ""
        self._state = 0  # of the search through the text
        self._whole_state = 0  # of the search through the text with what is left out; the same if nothing is
        self._hidden: list[tuple[int, int]] = []  # of each special token: the text before it, its own length

    @property
    def safe_text(self) -> str:
        """The text without an end that may turn out to be the beginning of a stop string."""
        if self._automaton is None:
            return self.text
        held = 0 if self._include else self._automaton.depths[self._state]
        if self._hidden:
            begin, num_hidden, _ = self._locate(len(self.text), self._automaton.depths[self._whole_state])
            if num_hidden or not self._include:
                held = max(held, len(self.text) - begin)
        return self.text[: len(self.text) - held] if held else self.text

    def append(self, text: str, num_tokens: int, hidden: str = "") -> str | None:
        """Adds what the token number `num_tokens` gave; returns the stop string that this completed, if any.

        The one that begins first counts, the longest of those that begin together. hidden: a special token
        that is left out of the text, behind it.
        """
        start = len(self.text)
        self.text += text
        if self._automaton is None:
            return None
        if num_tokens <= self._min_tokens:
            self._state = self._whole_state = 0  # no stop string may begin before here
            self._hidden.clear()
            return None
        matches = list(self._search(text, start))
        if self._hidden:
            matches += self._search_whole(text, start)
        else:
            self._whole_state = self._state
        if hidden:
            matches += self._search_hidden(hidden)
        if not matches:
            return None
        begin, _, stop = min(matches)
        self.text = self.text[:begin] + stop * self._include
        return stop

    def _search(self, text: str, start: int) -> Iterator[tuple[int, int, str]]:
        """The stop strings that end in new text: where each begins, its length negated, and itself."""
        automaton, state = self._automaton, self._state
        assert automaton is not None
        for end, character in enumerate(map(ord, text), start + 1):
            state = automaton.step(state, character)
            if automaton.found[state]:
                node = automaton.found[state]
                yield end - automaton.depths[node], -automaton.depths[node], automaton.text_of(node)
        self._state = state

    def _search_whole(self, text: str, start: int) -> Iterator[tuple[int, int, str]]:
        """As `_search`, of those with a special token in them."""
        assert self._automaton is not None
        for end, character in enumerate(map(ord, text), start + 1):
            self._whole_state = self._automaton.step(self._whole_state, character)
            yield from self._found_whole(end)

    def _search_hidden(self, hidden: str) -> Iterator[tuple[int, int, str]]:
        """As `_search`, of those that end with this special token."""
        assert self._automaton is not None
        for character in map(ord, hidden):
            self._whole_state = self._automaton.step(self._whole_state, character)
        self._hidden.append((len(self.text), len(hidden)))
        yield from self._found_whole(len(self.text))

    def _found_whole(self, end: int) -> Iterator[tuple[int, int, str]]:
        automaton = self._automaton
        assert automaton is not None
        node = automaton.found[self._whole_state]
        while node:
            begin, num_hidden, is_cut = self._locate(end, automaton.depths[node])
            if num_hidden and not is_cut:
                yield begin, -automaton.depths[node], automaton.text_of(node)
            node = automaton.found[automaton.links[node]]

    def _locate(self, end: int, length: int) -> tuple[int, int, bool]:
        """The place `length` characters before an end of the text, the special tokens left out counted in.

        Returns where that is in the text, how many special tokens are between, and whether the first of them
        is cut by it.
        """
        num_hidden = 0
        for before, hidden_length in reversed(self._hidden):
            if length <= end - before:
                break
            length -= end - before + hidden_length
            end, num_hidden = before, num_hidden + 1
            if length <= 0:
                return end, num_hidden, length < 0
        return end - length, num_hidden, False
