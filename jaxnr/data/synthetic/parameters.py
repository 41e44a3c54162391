"""Every number of the generated world, with its reason.

They were chosen so that the logs look plausible and contain the problem of the paper (several latent interests a user,
seen in searches and pages before news clicks, in other words, among noise). They were settled by looking at counts and
rates of the generated logs alone and frozen before any learning result was looked at.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldParameters:
    """Sizes, rates and probabilities of the generated world; times in days unless the name says otherwise."""

    # Size: small enough for a laptop to embed and to train on in minutes, large enough for a 4-day test window.
    days: int = 28
    n_users: int = 600
    n_articles: int = 2400
    start: int = 1_740_960_000
    """Monday 3 March 2025, 00:00 UTC; any fixed Monday would do."""
    backlog_days: float = 4.0
    """Articles older than the log, so that the first requests find a stocked catalogue."""

    # Articles.
    article_life_days: float = 9.0
    """News ages, but features are still read a week later; each article's life varies by a fifth."""
    quality_sigma: float = 0.4
    """Log-normal and mild: headlines differ in pull, yet interest matters more than quality."""
    subject_skew: float = 0.5
    """Zipf exponent of subject popularity, among articles and users alike: some are big, none is everything."""
    burst_share: float = 0.01
    """Share of (day, subject) pairs in which a story breaks."""
    burst_factor: float = 6.0
    """A breaking subject publishes so many times its usual rate that day."""

    # Users and their interests.
    cold_share: float = 0.2
    """New readers: the paper looks at cold users apart."""
    min_interests: int = 3
    max_interests: int = 6
    weight_concentration: float = 2.0
    """Dirichlet: one or two interests lead, the others still matter."""
    home_topics: int = 3
    home_topic_boost: float = 4.0
    """Interests cluster: people who follow one subject of a topic often follow its neighbours."""
    activity_sigma: float = 0.35
    """Log-normal spread of how much users do."""
    emerge_share: float = 0.7
    """Interests (after a user's first, which lasts throughout) that begin inside the window: a fixed profile would make
    the latest signals no better than the old ones."""
    last_start: float = 26.0
    """Interests begin up to here, so that some are new when the test window opens."""
    fade_share: float = 0.4
    """Share of the other later interests, present from the start, that end inside the window."""
    lead_share: float = 0.8
    """Share of emerging interests that show in searches and pages before news. Together with old interests that happen
    to do so, about half of all interests."""
    min_lead: float = 2.0
    max_lead: float = 5.0
    """The paper's premise: other streams show an interest days before news clicks do."""
    news_lead: float = 2.0
    """Emerging interests that do not lead begin with news, and are looked up within so many days."""
    stream_concentration: float = 4.0
    """Dirichlet over (search, web, news) an interest: recipes are searched, politics is read."""

    # Searches and pages.
    browse_sessions_per_day: float = 0.45
    """With about two events a session, some 25 clean searches and pages a user in four weeks."""
    session_continue: float = 0.5
    """A session goes on with another search or page with this probability."""
    fresh_factor: float = 2.5
    fresh_days: float = 3.0
    """Someone with a new interest looks it up more in the first days."""

    # News requests, slates and clicks.
    news_visits_per_day: float = 0.9
    """Most readers open the news about daily."""
    second_visit: float = 0.2
    """Chance of an evening visit after one earlier on the day."""
    slate_size: int = 15
    """About what two phone screens show."""
    popular_share: float = 0.25
    category_share: float = 0.2
    explore_share: float = 0.3
    followed_share: float = 0.25
    """The existing recommender: popular and recent, categories clicked before, random, and what the reader follows."""
    follow_subject: float = 0.5
    follow_topic: float = 0.3
    """Of the followed part: tags of a subject, sections of a topic; the rest is a section picked for no reason."""
    popular_age: float = 2.0
    category_age: float = 5.0
    """Time constants of the recommender's freshness; long enough that older articles are still shown and clicked."""
    position_decay: float = 0.15
    """Chance to look at position p (from 0) is 1 / (1 + decay * p)."""
    attract_interest: float = 0.5
    attract_topic: float = 0.06
    attract_other: float = 0.012
    """Chance to click a seen article on a current interest, on its topic, on anything else: gives a click-through rate
    of some percent, most of it on interests."""

    # Cold users.
    cold_join_days: float = 12.0
    """They join within the last so many days."""
    cold_browse_sessions: float = 1.0
    """Mean number of sessions beyond the first."""
    cold_news_days: float = 7.0
    cold_visits_per_day: float = 0.3
    """They read news in the last week only, seldom."""

    # Noise, as share of all events.
    noise_share: float = 0.27
    navigational: float = 0.35
    malformed: float = 0.2
    spam: float = 0.15
    """Of the noise; the rest is one-off: a gift, homework, somebody else at the keyboard."""
