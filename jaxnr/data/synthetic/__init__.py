"""The generated world: a seeded log of searches, pages and news clicks with the interests behind it known."""
