//! This module limits log lines whose cause any program can repeat: one line is logged in a while, with the count of
//! those that were left out.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// After a line, no more is logged about the same key for this long.
const PAUSE: Duration = Duration::from_secs(60);
/// This many keys are told apart, and all others count as one.
const MOST: usize = 64;

/// Decides which of many lines are logged.
#[derive(Debug)]
pub struct LogLimiter<K> {
    said: HashMap<Option<K>, Said>,
}

#[derive(Debug)]
struct Said {
    at: Instant,
    left_out: u64,
}

impl<K> Default for LogLimiter<K> {
    fn default() -> Self {
        Self { said: HashMap::new() }
    }
}

impl<K: Eq + Hash> LogLimiter<K> {
    /// Decides whether to log a line about `key` now. Returns how many lines about it were left out before, or `None`
    /// if this one is to be left out too.
    pub fn say(&mut self, key: K) -> Option<u64> {
        self.say_at(key, Instant::now())
    }

    fn say_at(&mut self, key: K, now: Instant) -> Option<u64> {
        let key = Some(key);
        let known = self.said.contains_key(&key);
        if !known && self.said.len() >= MOST {
            // What is quiet meanwhile is told as if it were new.
            self.said.retain(|_, said| now < said.at + PAUSE);
        }
        let key = if known || self.said.len() < MOST { key } else { None };
        match self.said.get_mut(&key) {
            Some(said) if now < said.at + PAUSE => {
                said.left_out += 1;
                None
            }
            Some(said) => {
                said.at = now;
                Some(std::mem::take(&mut said.left_out))
            }
            None => {
                self.said.insert(key, Said { at: now, left_out: 0 });
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_a_while_for_each_thing() {
        let (mut seldom, start) = (LogLimiter::default(), Instant::now());
        assert_eq!(seldom.say_at(1, start), Some(0));
        for _ in 0..1000 {
            assert_eq!(seldom.say_at(1, start + PAUSE / 2), None);
        }
        assert_eq!(seldom.say_at(2, start + PAUSE / 2), Some(0));
        assert_eq!(seldom.say_at(1, start + PAUSE), Some(1000));
        assert_eq!(seldom.say_at(1, start + PAUSE * 2), Some(0));
    }

    #[test]
    fn things_beyond_all_number_are_one() {
        let (mut seldom, start) = (LogLimiter::default(), Instant::now());
        let said = (0..100_000).filter(|key| seldom.say_at(*key, start).is_some()).count();
        assert_eq!((said, seldom.said.len()), (MOST + 1, MOST + 1));
        // A while later there is room again.
        let later = start + PAUSE;
        assert_eq!(seldom.say_at(200_000, later), Some(0));
        assert!(seldom.said.len() <= MOST + 1);
    }
}
