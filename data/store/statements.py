"""The SQL of `data.store.build`: what is worked out of the codes of one chunk of features, `$low` to `$high`.

The surprise is in what a plain query would cost or get wrong; it stands beside each.
"""

# Sums are of whole numbers of `unit` (a 2^-40th of the largest value): a float sum depends on the threads.
MOMENTS = """
SELECT feature, count(*) AS n, greatest(max(value), 0) AS highest, least(min(value), 0) AS lowest,
       sum(CAST(value::DOUBLE / $unit AS BIGINT))::DOUBLE * $unit / count(*) AS mean,
       quantile_cont(value::DOUBLE, LEVELS) AS quantiles
FROM work.fired WHERE feature >= $low AND feature < $high GROUP BY feature
"""

HISTOGRAMS = """
WITH counts AS (
    SELECT feature, count(*) AS n,
           least($bins - 1, floor((value::DOUBLE - lowest) / (highest::DOUBLE - lowest) * $bins)::INTEGER) AS bin
    FROM work.fired JOIN moments USING (feature) WHERE feature >= $low AND feature < $high GROUP BY ALL),
grid AS (SELECT feature, bin::INTEGER AS bin FROM moments, range($bins) AS bins(bin))
SELECT feature, list(coalesce(counts.n, 0) ORDER BY bin) AS counts
FROM grid LEFT JOIN counts USING (feature, bin) GROUP BY feature
"""

FAVOURITES = """
WITH counts AS (
    SELECT feature, value > 0 AS positive, id, count(*) AS n, sum(CAST(value::DOUBLE / $unit AS BIGINT)) AS total
    FROM work.fired WHERE feature >= $low AND feature < $high GROUP BY ALL),
ranked AS (
    SELECT *, row_number() OVER (PARTITION BY feature, positive ORDER BY n DESC, abs(total) DESC, id) AS rank
    FROM counts),
kept AS (
    SELECT *, abs(total)::DOUBLE / n AS size,
           row_number() OVER (PARTITION BY feature, positive, n >= 3 ORDER BY size DESC, id) AS place
    FROM ranked QUALIFY rank <= $keep OR (n >= 3 AND place <= $keep)),
named AS (
    SELECT feature, positive, rank, place, kept.n AS n,
           struct_pack(id := id, n := kept.n, share := kept.n / occurrences.n,
                       mean := total::DOUBLE * $unit / kept.n) AS token
    FROM kept JOIN work.occurrences AS occurrences USING (id))
SELECT feature, positive, coalesce(list(token ORDER BY rank) FILTER (rank <= $keep), []) AS tokens,
       coalesce(list(token ORDER BY place) FILTER (n >= 3 AND place <= $keep), []) AS strong
FROM named GROUP BY feature, positive
"""

FEATURES = """
INSERT INTO store.features
SELECT feature, n IS NOT NULL, coalesce(n, 0), coalesce(n, 0) / $n_ordinary,
       coalesce(highest, 0), coalesce(lowest, 0), mean, quantiles[3], quantiles[5], quantiles[7],
       CASE WHEN n IS NULL THEN [] ELSE list_transform(range(len(histograms.counts) + 1),
            lambda i: lowest + (highest::DOUBLE - lowest) * i / len(histograms.counts)) END,
       coalesce(histograms.counts, []),
       coalesce(top_logits, []), coalesce(bottom_logits, []), coalesce(logit_edges, []), coalesce(logit_counts, []),
       coalesce(neighbours, []), coalesce(plus.tokens, []), coalesce(minus.tokens, [])
FROM range($low, $high) AS every(feature)
LEFT JOIN moments USING (feature)
LEFT JOIN histograms USING (feature)
LEFT JOIN favourites AS plus ON plus.feature = every.feature AND plus.positive
LEFT JOIN favourites AS minus ON minus.feature = every.feature AND NOT minus.positive
LEFT JOIN decoder ON decoder.feature = every.feature
ORDER BY every.feature
"""

PROFILES = """
INSERT INTO store.profiles
WITH counts AS (
    SELECT feature, bin, count(*) AS n, sum(CAST(value::DOUBLE / $unit AS BIGINT)) AS total
    FROM work.fired WHERE feature >= $low AND feature < $high GROUP BY ALL),
grid AS (SELECT feature, bin::INTEGER AS bin FROM range($low, $high) AS every(feature), range($bins) AS bins(bin)),
places AS (
    SELECT feature, list(coalesce(n, 0) ORDER BY bin) AS counts,
           list(coalesce(total::DOUBLE * $unit / n, 0) ORDER BY bin) AS means
    FROM grid LEFT JOIN counts USING (feature, bin) GROUP BY feature)
SELECT places.feature, coalesce(quantiles, []), coalesce(plus.strong, []), coalesce(minus.strong, []), counts, means,
       coalesce(by_jaccard, []), coalesce(by_phi, []), x, y, cluster, loss
FROM places
LEFT JOIN decoder ON decoder.feature = places.feature
LEFT JOIN moments ON moments.feature = places.feature
LEFT JOIN favourites AS plus ON plus.feature = places.feature AND plus.positive
LEFT JOIN favourites AS minus ON minus.feature = places.feature AND NOT minus.positive
ORDER BY places.feature
"""

PEAKS = """
WITH ends AS (
    SELECT feature, start, max(value) AS high, min(value) AS low
    FROM work.fired WHERE feature >= $low AND feature < $high GROUP BY feature, start),
poles AS (
    SELECT feature, '+' AS pole, start, high AS peak, highest AS extreme FROM ends JOIN moments USING (feature)
    WHERE high > 0
    UNION ALL
    SELECT feature, '-', start, low, lowest FROM ends JOIN moments USING (feature) WHERE low < 0)
SELECT feature, pole, start, doc, split, peak,
       least($bands - 1, floor(peak::DOUBLE / extreme * $bands)::INTEGER) AS band
FROM poles JOIN work.windows USING (start)
"""

# Ranking every window would sort millions of rows for a dozen. So each of the next three first finds the few largest of
# a group (or those of smallest lot), with ties, and ranks only these.

# `again`: this window is not its document's best; such windows come after all the others. Of them the `top` best are
# among the 2 `top` largest windows wherever they are needed, which is where there are fewer documents than `top`.
TOPS = """
WITH bests AS (
    SELECT feature, pole, split, best.size AS size, -best.back AS start
    FROM (SELECT feature, pole, split, max(struct_pack(size := abs(peak), back := -start)) AS best
          FROM peaks GROUP BY feature, pole, split, doc)),
best_edges AS (SELECT feature, pole, split, list_min(max(size, $top)) AS edge FROM bests GROUP BY ALL),
edges AS (SELECT feature, pole, split, list_min(max(abs(peak), 2 * $top)) AS edge FROM peaks GROUP BY ALL),
candidates AS (
    SELECT feature, pole, split, start, size, false AS again
    FROM bests JOIN best_edges USING (feature, pole, split) WHERE size >= edge
    UNION ALL
    SELECT feature, pole, split, start, abs(peak), true
    FROM peaks JOIN edges USING (feature, pole, split) ANTI JOIN bests USING (feature, pole, start)
    WHERE abs(peak) >= edge),
ranked AS (
    SELECT feature, pole, start, row_number() OVER (PARTITION BY feature, pole ORDER BY again, size DESC, start) <= $top
               AS true_top,
           row_number() OVER (PARTITION BY feature, pole, split ORDER BY again, size DESC, start) AS in_split
    FROM candidates QUALIFY true_top OR in_split <= $top // 2)
SELECT feature, pole, 'top' AS kind, band, start, doc, split, peak,
       row_number() OVER (PARTITION BY feature, pole ORDER BY true_top DESC, abs(peak) DESC, start) - 1 AS rank
FROM ranked JOIN peaks USING (feature, pole, start)
"""

# The bands of `interval` are of equal width, these hold equally many windows: most values are small.
BY_RANK = """
WITH edges AS (SELECT feature, pole, quantile_disc(abs(peak), LEVELS) AS edges FROM peaks GROUP BY ALL)
SELECT feature, pole, start, doc, split, peak, len(list_filter(edges, lambda edge: abs(peak) > edge))::INTEGER AS band
FROM peaks JOIN edges USING (feature, pole)
"""

INTERVALS = """
WITH lots AS (SELECT *, hash(feature, start, $seed, $kind) AS lot FROM SOURCE),
edges AS (SELECT feature, pole, band, split, list_max(min(lot, $keep)) AS edge FROM lots GROUP BY ALL),
ranked AS (
    SELECT lots.*, row_number() OVER (PARTITION BY feature, pole, band, split ORDER BY lot, start) AS turn
    FROM lots JOIN edges USING (feature, pole, band, split) WHERE lot <= edge QUALIFY turn <= $keep),
chosen AS (
    SELECT *, row_number() OVER (PARTITION BY feature, pole, band ORDER BY turn, lot, start) AS place
    FROM ranked QUALIFY place <= $keep)
SELECT feature, pole, $kind AS kind, band, start, doc, split, peak,
       row_number() OVER (PARTITION BY feature, pole ORDER BY band, place) - 1 AS rank
FROM chosen
"""

RANDOMS = """
WITH lots AS (SELECT *, hash(feature, start, $seed, 'random') AS lot FROM peaks),
edges AS (SELECT feature, pole, split, list_max(min(lot, $keep)) AS edge FROM lots GROUP BY ALL),
ranked AS (
    SELECT lots.*, row_number() OVER (PARTITION BY feature, pole, split ORDER BY lot, start) AS turn
    FROM lots JOIN edges USING (feature, pole, split) WHERE lot <= edge QUALIFY turn <= $keep)
SELECT feature, pole, 'random' AS kind, band, start, doc, split, peak,
       row_number() OVER (PARTITION BY feature, pole ORDER BY turn, lot, start) - 1 AS rank
FROM ranked QUALIFY rank < $keep
"""

# PLACES is one value for each place of a window: a wide aggregate is far cheaper here than a list built from a join.
EXAMPLES = """
INSERT INTO store.examples
WITH chosen AS (FROM tops UNION ALL FROM intervals UNION ALL FROM quantiles UNION ALL FROM randoms),
wanted AS (SELECT DISTINCT feature, start FROM chosen),
values AS (
    SELECT feature, start, list_value(PLACES) AS acts
    FROM work.fired JOIN wanted USING (feature, start)
    WHERE feature >= $low AND feature < $high GROUP BY feature, start)
SELECT feature, pole, kind, band, rank, chosen.doc, start, chosen.split, token_ids,
       acts[:len(token_ids)], peak, list_position(acts, peak) - 1
FROM chosen JOIN values USING (feature, start) JOIN work.windows USING (start)
ORDER BY feature, pole, kind, rank
"""
