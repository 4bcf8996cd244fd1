//! Waiting for what another process does.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const PERIOD: Duration = Duration::from_millis(5);

/// Asks `probe` every few milliseconds until it returns something. For a plain condition, `probe` may end in
/// `.then_some(())`.
///
/// # Errors
///
/// If `probe` returned nothing for `timeout`; the message names `what` was waited for.
pub fn wait_for<T>(what: &str, timeout: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        // In this order: on a busy machine the last probe may come long after the last look at the clock.
        let late = Instant::now() >= deadline;
        if let Some(value) = probe() {
            return Ok(value);
        }
        if late {
            bail!("gave up on {what} after {timeout:?}");
        }
        std::thread::sleep(PERIOD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_what_the_probe_found() {
        let mut calls = 0;
        let value = wait_for("the third call", Duration::from_secs(60), || {
            calls += 1;
            (calls == 3).then_some(calls)
        });
        assert_eq!(value.expect("the third call came"), 3);
    }

    #[test]
    fn names_what_never_came() {
        let error = wait_for::<()>("nothing", Duration::ZERO, || None).expect_err("nothing comes");
        assert!(error.to_string().contains("gave up on nothing"), "{error}");
    }
}
