//! A QEMU that does not answer is named, with the reason as far as it can be seen, and waited for.

use std::cell::RefCell;
use std::pin::pin;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{PATIENCE, Qmp};
use crate::DriverError;
use crate::process::Hang;

/// A QEMU that has not answered for this long is said to hang. One that is stopped is waited for no longer, as a rule.
const HANGS: Duration = Duration::from_secs(2);

/// QEMU does not answer to a command.
#[derive(Clone, Copy)]
pub(super) struct Silence {
    command: &'static str,
    /// The command was written at this moment.
    since: Instant,
    hang: Hang,
}

/// A QEMU is waited for longer, until this is dropped.
pub(in crate::qemu) struct Patient<'a>(&'a Qmp);

impl Drop for Patient<'_> {
    fn drop(&mut self) {
        self.0.patience.set(None);
    }
}

/// A silence of QEMU that is told of, until this is dropped.
struct Told<'a>(&'a RefCell<Option<Silence>>);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.replace(None);
    }
}

impl Qmp {
    /// Waits so long for the answer to a command, until the returned value is dropped.
    pub(in crate::qemu) fn waiting_for(&self, patience: Duration) -> Patient<'_> {
        self.patience.set(Some(patience));
        Patient(self)
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience.get().unwrap_or(PATIENCE)
    }

    /// Returns what is waited for, in words, if QEMU does not answer at present.
    pub(in crate::qemu) fn waits_for(&self) -> Option<String> {
        let Silence { command, since, hang } = (*self.silence.borrow())?;
        let (pid, seconds) = (self.pid, since.elapsed().as_secs());
        Some(format!("QEMU (process {pid}) to answer to `{command}`; it has not for {seconds} s{hang}"))
    }

    /// Waits for the answer to a command. A QEMU that hangs is told of meanwhile; one that is stopped is not waited for, unless
    /// it is to be waited for longer than others.
    pub(super) async fn answer_within<T>(
        &self,
        patience: Duration,
        command: &'static str,
        exchange: impl Future<Output = Result<T, DriverError>>,
    ) -> Result<T, DriverError> {
        let (began, mut exchange) = (Instant::now(), pin!(exchange));
        if let Ok(answered) = tokio::time::timeout(HANGS.min(patience), &mut exchange).await {
            return answered;
        }
        let _told = Told(&self.silence);
        loop {
            let hang = Hang::of(self.pid);
            let before = self.silence.replace(Some(Silence { command, since: began, hang }));
            if before.is_none_or(|before| before.hang != hang) {
                warn!(pid = self.pid, command, "QEMU does not answer{hang}");
            }
            let waited = began.elapsed();
            let gives_up = matches!(hang, Hang::Stopped(_)) && self.patience.get().is_none();
            if gives_up || waited >= patience {
                return Err(DriverError::Slow { request: command, after: waited, hang });
            }
            let look = HANGS.min(patience - waited);
            if let Ok(answered) = tokio::time::timeout(look, &mut exchange).await {
                info!(pid = self.pid, command, after = ?began.elapsed(), "QEMU answers again");
                return answered;
            }
        }
    }
}
