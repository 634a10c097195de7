//! How fast the queue moves: what a client that is sent away is told of when to come back.

use std::time::Instant;

/// Weight of the newest gap in the mean.
const NEWEST: f64 = 0.1;
/// Longest time a client is sent away for, in seconds.
const LONGEST_S: f64 = 60.0;

/// Mean time between the ends of requests while others wait for their places.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// The last end after which somebody waited.
    last: Option<Instant>,
    mean_s: Option<f64>,
}

impl Pace {
    /// A request has ended, while so many waited.
    pub(super) fn ended(&mut self, now: Instant, waiting: usize) {
        if let Some(last) = self.last {
            let gap = now.saturating_duration_since(last).as_secs_f64();
            self.mean_s = Some(self.mean_s.map_or(gap, |mean| mean + NEWEST * (gap - mean)));
        }
        // With nobody waiting the next gap says how often requests come, not how fast they go.
        self.last = (waiting > 0).then_some(now);
    }

    /// Whole seconds until half of those who wait will have begun: late enough to find room, early enough that the
    /// engine has not run dry.
    pub(super) fn retry_after_s(&self, waiting: usize) -> u32 {
        let wait = self.mean_s.unwrap_or_default() * waiting as f64 / 2.0;
        wait.clamp(1.0, LONGEST_S).ceil() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn clients_come_back_when_half_of_the_queue_has_begun() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(pace.retry_after_s(100), 1, "nothing is known yet");
        for seconds in [0, 2, 4, 6] {
            pace.ended(at(seconds), 10);
        }
        assert_eq!([1, 10, 11, 1000].map(|waiting| pace.retry_after_s(waiting)), [1, 10, 11, 60]);
        pace.ended(at(8), 0);
        pace.ended(at(1000), 5);
        assert_eq!(pace.retry_after_s(10), 10, "idle time is not counted");
        pace.ended(at(1012), 5);
        assert_eq!(pace.retry_after_s(10), 15, "2 + (12 − 2)/10 seconds each");
    }
}
