//! This module opens lanes again on ports that have lost them.
//!
//! A port that was lost is tried again and again, ever more rarely, for as long as there is something to send. So is a
//! port that could not be reached to begin with.

use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_net::port::OpenError;
use memlane_net::task;
use tokio::task::JoinSet;
use tracing::{debug, info};

use crate::lanes::LaneEnd;
use crate::routes::{Route, Routes};

/// A port that has lost a lane is left alone for this long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The pause doubles with every try, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// A lane that lasted this long was worth opening, and the pauses begin anew.
const STEADY: Duration = Duration::from_secs(10);
/// The ports that lack a lane are looked for in these intervals.
const LOOK: Duration = Duration::from_millis(100);

/// Opens lanes where they are missing.
pub(crate) struct LaneReconnector {
    routes: Rc<Routes>,
    /// There is one for each route.
    tries: Vec<Tries>,
    opening: JoinSet<(usize, Result<LaneEnd, OpenError>)>,
    look_at: Instant,
}

/// These are the tries on one route.
#[derive(Debug)]
struct Tries {
    pause: Duration,
    /// The route is to be tried again at this time. It is `None` while nothing is missing.
    due: Option<Instant>,
    opened: Option<Instant>,
    under_way: bool,
}

impl LaneReconnector {
    /// Makes a reconnector for lanes on `routes`.
    pub(crate) fn new(routes: Rc<Routes>) -> Self {
        let tries = routes.all().iter().map(|_| Tries::new()).collect();
        Self { routes, tries, opening: JoinSet::new(), look_at: Instant::now() }
    }

    /// Returns the next lane that could be opened on a route where one `is_missing`. The caller awaits this again and
    /// again.
    pub(crate) async fn next(&mut self, is_missing: impl Fn(&Route) -> bool) -> LaneEnd {
        loop {
            if self.look_at <= Instant::now() {
                self.look(&is_missing);
            }
            tokio::select! {
                Some(opened) = self.opening.join_next() => {
                    let (index, result) = opened.expect("opening a lane does not panic");
                    self.tries[index].note(result.is_ok(), Instant::now());
                    match result {
                        Ok(end) => return end,
                        Err(error) => debug!(%error, "a port is still lost"),
                    }
                }
                () = tokio::time::sleep_until(self.look_at.into()) => {}
            }
        }
    }

    fn look(&mut self, is_missing: impl Fn(&Route) -> bool) {
        let now = Instant::now();
        self.look_at = now + LOOK;
        for (index, (route, tries)) in self.routes.all().iter().zip(&mut self.tries).enumerate() {
            if !tries.is_due(is_missing(route), now) {
                continue;
            }
            let Some(opening) = self.routes.open(route) else {
                info!(port = %route.port.name, "no more lanes are opened in this migration, there were so many");
                tries.note(false, now);
                continue;
            };
            tries.under_way = true;
            task::spawn_in(&mut self.opening, "reopening of a lane", async move { (index, opening.await) });
        }
    }
}

impl Tries {
    fn new() -> Self {
        Self { pause: FIRST_PAUSE, due: None, opened: None, under_way: false }
    }

    /// Tells whether to try now.
    fn is_due(&mut self, missing: bool, now: Instant) -> bool {
        if self.under_way {
            return false;
        }
        if !missing {
            self.due = None;
            if self.opened.is_some_and(|opened| now - opened > STEADY) {
                self.pause = FIRST_PAUSE;
            }
            return false;
        }
        *self.due.get_or_insert(now + self.pause) <= now
    }

    /// Notes that a try has ended.
    fn note(&mut self, opened: bool, now: Instant) {
        (self.under_way, self.due) = (false, None);
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
        if opened {
            self.opened = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_tried_ever_more_rarely() {
        let (mut tries, start) = (Tries::new(), Instant::now());
        let mut tried = Vec::new();
        for look in 0..300 {
            let now = start + LOOK * look;
            if tries.is_due(true, now) {
                tried.push((now - start).as_millis());
                tries.note(false, now);
            }
        }
        assert_eq!(tried, [300, 900, 2000, 4100, 8200, 12_300, 16_400, 20_500, 24_600, 28_700]);
    }

    #[test]
    fn a_steady_lane_is_opened_again_at_once() {
        let (mut tries, mut now) = (Tries::new(), Instant::now());
        for steady in [false, false, true, false] {
            let pause = tries.pause;
            assert!(!tries.is_due(true, now));
            now += pause;
            assert!(tries.is_due(true, now), "after {pause:?}");
            tries.under_way = true;
            assert!(!tries.is_due(true, now + LONGEST_PAUSE), "one try at a time");
            tries.note(true, now);
            now += if steady { 2 * STEADY } else { STEADY / 2 };
            assert!(!tries.is_due(false, now));
            let expected = if steady { FIRST_PAUSE } else { 2 * pause };
            assert_eq!(tries.pause, expected);
        }
    }
}
