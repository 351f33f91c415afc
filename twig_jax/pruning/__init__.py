"""Which visual tokens the deep layers see."""
