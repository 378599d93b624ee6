"""The prompt cache keeps what was used last, within its bytes."""

import torch

from workers.prompt_cache import PromptCache


def embeds(tokens: int) -> torch.Tensor:
    return torch.zeros(tokens, 4)


def test_hits_and_misses_are_counted() -> None:
    cache = PromptCache(1000)
    assert cache.get("a") is None
    cache.put("a", embeds(2))
    assert cache.get("a") is not None
    assert (cache.hits, cache.misses) == (1, 1)


def test_the_least_recently_used_goes() -> None:
    cache = PromptCache(3 * embeds(2).nbytes)
    for text in "abc":
        cache.put(text, embeds(2))
    cache.get("a")
    cache.put("d", embeds(2))
    assert [cache.get(text) is not None for text in "abcd"] == [True, False, True, True]


def test_bytes_are_bounded_whatever_comes() -> None:
    limit = 10 * embeds(1).nbytes
    cache = PromptCache(limit)
    for number in range(500):
        cache.put(str(number % 37), embeds(1 + number % 9))
        assert cache.nbytes <= limit
    assert cache.nbytes == sum(entry.nbytes for text in map(str, range(37)) if (entry := cache.get(text)) is not None)


def test_an_entry_larger_than_the_cache_is_not_kept() -> None:
    cache = PromptCache(10)
    cache.put("a", embeds(50))
    assert (len(cache), cache.nbytes) == (0, 0)
    assert PromptCache(0).get("a") is None
