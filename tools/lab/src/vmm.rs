//! A running `memlane-vmm`, and the requests to it.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::process::LabProcess;
use crate::wait::wait_for;

/// Longest wait for a VMM to listen, or to end, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for an answer of a VMM: it may have to replay a long run.
const ANSWER: Duration = Duration::from_secs(300);

/// A running `memlane-vmm`.
#[derive(Debug)]
pub struct LabVmm {
    process: LabProcess,
    control: PathBuf,
}

/// A connection to a `memlane-vmm`, which is lost when that ends.
#[derive(Debug)]
pub struct VmmSession {
    stream: BufReader<UnixStream>,
}

/// A stream of a guest's progress. It should be read a few times a second.
#[derive(Debug)]
pub struct ProgressStream {
    stream: BufReader<UnixStream>,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
}

impl LabVmm {
    /// Makes the handle of the VMM `process`, which listens for requests at `control`.
    pub(crate) fn new(process: LabProcess, control: PathBuf) -> Self {
        Self { process, control }
    }

    /// Returns the process.
    pub fn process(&mut self) -> &mut LabProcess {
        &mut self.process
    }

    /// Asks for the guest's statistics.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer.
    pub fn stats(&mut self) -> Result<Value> {
        self.ask("stats")
    }

    /// Makes the VMM forget the stalls so far.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer.
    pub fn reset_stalls(&mut self) -> Result<()> {
        self.ask("reset-stalls").map(drop)
    }

    /// Makes the VMM compare all of the guest's RAM with the model.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer.
    pub fn verify(&mut self) -> Result<Value> {
        self.ask("verify")
    }

    /// Ends the VMM.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn quit(mut self) -> Result<()> {
        self.ask("quit")?;
        ensure!(self.process.wait_timeout(PATIENCE)?.is_some(), "memlane-vmm does not end");
        Ok(())
    }

    /// Opens a connection of its own to the VMM, for a caller that asks often, or that asks a VMM which is about to
    /// end.
    ///
    /// # Errors
    ///
    /// If the VMM does not listen.
    pub fn session(&self) -> Result<VmmSession> {
        let stream =
            wait_for("the VMM's control socket", PATIENCE, || UnixStream::connect(&self.control).ok())?;
        stream.set_read_timeout(Some(ANSWER))?;
        Ok(VmmSession { stream: BufReader::new(stream) })
    }

    fn ask(&mut self, what: &str) -> Result<Value> {
        let answer = self.session().and_then(|mut session| session.ask(what));
        let failed = || format!("asking {} for {what}", self.process.name());
        answer.with_context(failed).map_err(|error| error.context(self.process.log_tail()))
    }
}

impl VmmSession {
    /// Asks for the guest's statistics.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer, or has ended.
    pub fn stats(&mut self) -> Result<Value> {
        self.ask("stats")
    }

    /// Makes the VMM compare all of the guest's RAM with the model.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer, or has ended.
    pub fn verify(&mut self) -> Result<Value> {
        self.ask("verify")
    }

    /// Limits the wait for each later answer to `longest`.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn set_patience(&mut self, longest: Duration) -> Result<()> {
        Ok(self.stream.get_ref().set_read_timeout(Some(longest))?)
    }

    /// Makes the VMM report the guest's progress once in each period `every`, as long as it has a guest.
    ///
    /// # Errors
    ///
    /// If the VMM has ended.
    pub fn follow(mut self, every: Duration) -> Result<ProgressStream> {
        let request = format!("{{\"do\":\"follow\",\"every_us\":{}}}\n", every.as_micros());
        self.stream.get_mut().write_all(request.as_bytes())?;
        self.stream.get_ref().set_nonblocking(true)?;
        Ok(ProgressStream { stream: self.stream, line: Vec::new() })
    }

    fn ask(&mut self, what: &str) -> Result<Value> {
        self.stream.get_mut().write_all(format!("{{\"do\":\"{what}\"}}\n").as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let mut answer: Value = serde_json::from_str(&line).context("the VMM's answer is no JSON")?;
        match answer.get("error") {
            Some(error) => bail!("{error}"),
            None => Ok(answer["ok"].take()),
        }
    }
}

impl ProgressStream {
    /// Returns the reports that have come since the last call, without waiting; `None` once the VMM has ended.
    ///
    /// # Errors
    ///
    /// If what was told is no JSON.
    pub fn told(&mut self) -> Result<Option<Vec<Value>>> {
        let mut told = Vec::new();
        loop {
            match self.stream.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    let mut answer: Value =
                        serde_json::from_slice(&self.line).context("what the VMM tells is no JSON")?;
                    told.push(answer["ok"].take());
                    self.line.clear();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(told)),
                // Its end is told by whoever waits for it.
                Ok(_) | Err(_) => return Ok((!told.is_empty()).then_some(told)),
            }
        }
    }
}
