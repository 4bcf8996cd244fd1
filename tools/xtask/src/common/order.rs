//! An order to move a guest, as `memlanectl` gives it and waits for its end.

use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use memlane_lab::{HostId, Rig};

/// A running `memlanectl migrate`.
pub(crate) struct MigrateCommand {
    child: Option<Child>,
    /// The time when the order was given.
    pub given: Instant,
    /// The exit code, once the command has ended by itself.
    pub exit: Option<i32>,
    /// The output, once the command has ended by itself.
    pub text: String,
}

impl MigrateCommand {
    /// Gives an order of these `words` to the daemon of host `at`.
    pub(crate) fn give(rig: &Rig, at: HostId, words: &[&str]) -> Result<Self> {
        let mut command = rig.ctl_command(at, &["--json"]);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().context("running memlanectl")?;
        Ok(Self { child: Some(child), given: Instant::now(), exit: None, text: String::new() })
    }

    /// Returns whether the command has ended. Its output is less than a pipe holds, so it need not be read before.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        let Some(child) = &mut self.child else { return Ok(true) };
        if child.try_wait().context("waiting for memlanectl")?.is_none() {
            return Ok(false);
        }
        let output = self.child.take().expect("it was there").wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.text = text(&output.stdout) + &text(&output.stderr);
        self.exit = output.status.code();
        Ok(true)
    }

    /// Ends the command, if it still runs.
    pub(crate) fn give_up(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only if it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for MigrateCommand {
    fn drop(&mut self) {
        self.give_up();
    }
}
