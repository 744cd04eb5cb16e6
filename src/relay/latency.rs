//! How long events take from their commit until the broker has acknowledged them: percentiles of the last minute.
//!
//! A log-linear histogram, as HdrHistogram has it: each power of two of microseconds is split into eight buckets, so a percentile is
//! at most 12.5 % above the true one. One event is one addition, without an allocation.

use std::time::Duration;

/// Buckets of each power of two, as a power of two.
const SPLIT: u32 = 3;
/// What takes longer than 2^40 µs (twelve days) is in the last bucket.
const POWERS: u32 = 40;
const BUCKETS: usize = ((POWERS - SPLIT + 1) << SPLIT) as usize;
/// The last minute is counted in six parts, of which the oldest one is forgotten at a time.
const PARTS: usize = 6;
const PART: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Latencies {
    parts: [[u32; BUCKETS]; PARTS],
    /// Which part since the beginning is counted in.
    current: u64,
}

/// Half of the events were acknowledged within `p50`, and 99 of 100 within `p99`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Percentiles {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { parts: [[0; BUCKETS]; PARTS], current: 0 }
    }
}

impl Latencies {
    /// Counts an event that was acknowledged after `latency`. `now` is the time since any fixed moment.
    pub(crate) fn observe(&mut self, now: Duration, latency: Duration) {
        self.forget(now);
        let part = self.parts.get_mut(position(self.current));
        if let Some(count) = part.and_then(|part| part.get_mut(bucket(latency))) {
            *count = count.saturating_add(1);
        }
    }

    /// Of the last minute; `None` when nothing was acknowledged in it.
    pub(crate) fn percentiles(&mut self, now: Duration) -> Option<Percentiles> {
        self.forget(now);
        let counts = |bucket: usize| self.parts.iter().filter_map(move |part| part.get(bucket)).map(|&n| u64::from(n));
        let total: u64 = (0..BUCKETS).flat_map(counts).sum();
        let percentile = |percent: u64| {
            let wanted = (total * percent).div_ceil(100);
            let mut below = 0;
            let reached = |&bucket: &usize| {
                below += counts(bucket).sum::<u64>();
                below >= wanted
            };
            Duration::from_micros((0..BUCKETS).find(reached).map_or(0, most))
        };
        (total > 0).then(|| Percentiles { p50: percentile(50), p99: percentile(99) })
    }

    /// Empties the parts that began more than a minute ago.
    fn forget(&mut self, now: Duration) {
        let part = now.as_secs() / PART.as_secs();
        for passed in (self.current + 1..=part).rev().take(PARTS) {
            if let Some(part) = self.parts.get_mut(position(passed)) {
                part.fill(0);
            }
        }
        self.current = self.current.max(part);
    }
}

fn position(part: u64) -> usize {
    usize::try_from(part % PARTS as u64).unwrap_or_default()
}

fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).clamp(1, (1 << POWERS) - 1);
    let power = micros.ilog2().max(SPLIT);
    let within = micros >> (power - SPLIT);
    // below 2^SPLIT each microsecond is a bucket; above, `within` has its highest bit set
    usize::try_from((u64::from(power - SPLIT) << SPLIT) + within).unwrap_or(BUCKETS)
}

/// The most microseconds that are counted in the bucket.
fn most(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let shift = (bucket >> SPLIT).saturating_sub(1);
    let within = bucket - (shift << SPLIT);
    ((within + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    fn after(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn each_latency_is_in_the_bucket_that_ends_at_it_or_an_eighth_above_it() {
        let samples = (0..POWERS).flat_map(|power| [0, 1, 7, 123_456_789].map(|more| (1_u64 << power) + more));
        for sample in samples.filter(|sample| sample >> POWERS == 0) {
            let end = most(bucket(micros(sample)));
            assert!(
                bucket(micros(sample)) < BUCKETS && (sample..=sample + sample / 8).contains(&end),
                "{sample}: {end}"
            );
        }
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
        assert_eq!(bucket(Duration::ZERO), 1);
    }

    #[test]
    fn percentiles_are_those_of_the_last_minute() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.percentiles(after(5)), None);
        for _ in 0..98 {
            latencies.observe(after(5), micros(800));
        }
        latencies.observe(after(5), micros(9_000));
        latencies.observe(after(5), micros(1_000_000));
        let percentiles = |p50, p99| Some(Percentiles { p50: micros(p50), p99: micros(p99) });
        assert_eq!(latencies.percentiles(after(59)), percentiles(831, 9_215));
        latencies.observe(after(59), micros(5));
        assert_eq!(latencies.percentiles(after(60)), percentiles(5, 5), "the first ten seconds are a minute ago");
        assert_eq!(latencies.percentiles(after(100_000)), None);
        latencies.observe(after(99_000), micros(5));
        assert_eq!(latencies.percentiles(after(100_000)), percentiles(5, 5), "a clock that steps back is no harm");
    }
}
