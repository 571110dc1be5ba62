"""Never ask twice. Knows: keys, records, segments. Does not know: HTTP, torch."""
