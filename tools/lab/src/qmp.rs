//! A connection of the harness with a QEMU: QMP, lines of JSON on a Unix socket (QEMU's `docs/interop/qmp-spec`).
//!
//! QEMU tells its events to every monitor, so this one also hears what happens to a guest that a daemon moves.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::wait_for;

/// Longest wait for a QEMU that starts: it may take all RAM from the host first.
const START: Duration = Duration::from_secs(60);
/// Longest wait for the answer to a command.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection with a QEMU's monitor, which talks to one client at a time.
pub struct Monitor {
    stream: BufReader<UnixStream>,
    /// The beginning of a line whose end has not been read yet.
    line: Vec<u8>,
    events: VecDeque<QmpEvent>,
    /// The number of seconds by which the clock of QEMU's host is ahead.
    ahead: f64,
}

/// An event that QEMU has reported.
#[derive(Debug)]
pub struct QmpEvent {
    name: String,
    /// The data of the event.
    pub data: Value,
    /// The time of the event by QEMU's own account and this machine's clock: seconds since 1970-01-01T00:00:00Z.
    pub at: f64,
}

impl Monitor {
    /// Connects as soon as a monitor listens.
    ///
    /// # Errors
    ///
    /// If nothing listens for a minute, or what does is no monitor.
    pub fn connect(socket: &Path) -> Result<Self> {
        Self::connect_while(socket, || true)
    }

    /// Connects as [`Self::connect`] does, to a QEMU that has just been started, as long as `runs` says that it runs.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`]; and as soon as QEMU does not run any more.
    pub fn connect_while(socket: &Path, mut runs: impl FnMut() -> bool) -> Result<Self> {
        let connected = wait_for("QEMU's monitor", START, || match UnixStream::connect(socket) {
            Ok(stream) => Some(Ok(stream)),
            Err(_) if runs() => None,
            Err(_) => Some(Err(anyhow!("QEMU has ended"))),
        });
        let stream = connected.and_then(|connected| connected).with_context(|| {
            format!("connecting to {}: if QEMU has ended, its log says why", socket.display())
        })?;
        let mut monitor =
            Self { stream: BufReader::new(stream), line: Vec::new(), events: VecDeque::new(), ahead: 0.0 };
        let greeting = monitor.next(ANSWER)?.context("QEMU's monitor says nothing")?;
        ensure!(greeting["QMP"].is_object(), "{} is no QMP monitor: it says {greeting}", socket.display());
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Returns this monitor for a QEMU on a host whose clock is so many seconds ahead of the clock of this machine.
    pub(crate) fn with_clock_ahead(self, ahead: f64) -> Self {
        Self { ahead, ..self }
    }

    /// Gives a command and returns its answer.
    ///
    /// # Errors
    ///
    /// If QEMU refuses it, has ended, or does not answer for a minute.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let order = json!({ "execute": command, "arguments": arguments });
        let failed = || format!("QEMU's {command}");
        self.stream.get_mut().write_all(format!("{order}\n").as_bytes()).with_context(failed)?;
        let until = Instant::now() + ANSWER;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut message =
                self.next(left).with_context(failed)?.with_context(|| format!("no answer to {order}"))?;
            if let Some(event) = QmpEvent::of(&message, self.ahead) {
                self.events.push_back(event);
            } else if let Some(error) = message.get("error") {
                bail!("QEMU refuses {order}: {}", error["desc"].as_str().unwrap_or("it does not say why"));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Returns the oldest event of a name that was not returned yet; `None` if there is none within `timeout`.
    ///
    /// # Errors
    ///
    /// If QEMU has ended.
    pub fn event(&mut self, name: &str, timeout: Duration) -> Result<Option<QmpEvent>> {
        if let Some(index) = self.events.iter().position(|event| event.name == name) {
            return Ok(self.events.remove(index));
        }
        let until = Instant::now() + timeout;
        while let Some(message) = self.next(until.saturating_duration_since(Instant::now()))? {
            match QmpEvent::of(&message, self.ahead) {
                Some(event) if event.name == name => return Ok(Some(event)),
                Some(event) => self.events.push_back(event),
                None => bail!("QEMU answers what was not asked: {message}"),
            }
        }
        Ok(None)
    }

    /// Forgets the events so far.
    ///
    /// # Errors
    ///
    /// As [`Self::execute`].
    pub fn forget_events(&mut self) -> Result<()> {
        // An answer comes after all events before it.
        self.execute("query-status", json!({}))?;
        self.events.clear();
        Ok(())
    }

    /// Returns the next line; `None` if it does not come within `timeout`.
    fn next(&mut self, timeout: Duration) -> Result<Option<Value>> {
        // A timeout of 0 would be none at all.
        self.stream.get_ref().set_read_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        match self.stream.read_until(b'\n', &mut self.line) {
            Ok(_) if self.line.ends_with(b"\n") => {
                let line = std::mem::take(&mut self.line);
                let line = String::from_utf8_lossy(&line);
                serde_json::from_str(&line).map(Some).with_context(|| format!("QEMU's monitor says {line:?}"))
            }
            Ok(_) => Err(anyhow!("QEMU has ended")),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
            Err(error) => Err(error).context("reading from QEMU's monitor"),
        }
    }
}

impl QmpEvent {
    fn of(message: &Value, ahead: f64) -> Option<Self> {
        let time = &message["timestamp"];
        Some(Self {
            name: message["event"].as_str()?.to_owned(),
            data: message["data"].clone(),
            at: time["seconds"].as_f64()? + time["microseconds"].as_f64()? / 1e6 - ahead,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A monitor at whose other end a script says `lines`, each after a line was heard.
    fn monitor(lines: &'static [&'static str]) -> Result<Monitor> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket)?;
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut heard = BufReader::new(stream.try_clone().expect("a descriptor"));
            stream.write_all(b"{\"QMP\": {}}\r\n").expect("a listener");
            for line in lines {
                heard.read_line(&mut String::new()).expect("a command");
                stream.write_all(format!("{line}\n").as_bytes()).expect("a listener");
            }
        });
        Monitor::connect(&socket)
    }

    const STOP: &str = r#"{"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 250000}}"#;

    #[test]
    fn events_may_come_before_an_answer_and_in_any_order() {
        const LINES: &[&str] = &[
            r#"{"return": {}}"#,
            concat!(
                r#"{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}"#,
                "\n",
                r#"{"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 250000}}"#,
                "\n",
                r#"{"return": {"status": "paused"}}"#
            ),
            STOP,
        ];
        let mut monitor = monitor(LINES).expect("a monitor");
        let answer = monitor.execute("query-status", json!({})).expect("an answer");
        assert_eq!(answer["status"], "paused");
        let stop = monitor.event("STOP", Duration::ZERO).expect("a monitor").expect("a stop");
        assert_eq!(stop.at, 7.25);
        assert!(monitor.event("STOP", Duration::ZERO).expect("a monitor").is_none());
        assert!(monitor.event("RESUME", Duration::ZERO).expect("a monitor").is_some());
    }

    #[test]
    fn refusals_and_ends_are_errors() {
        let mut refusing =
            monitor(&[r#"{"return": {}}"#, r#"{"error": {"desc": "no such thing"}}"#]).expect("a monitor");
        let error = refusing.execute("fly", json!({})).expect_err("a refusal");
        assert!(error.to_string().contains("no such thing"), "{error}");
        let error = refusing.event("STOP", ANSWER).expect_err("the other end has gone");
        assert!(error.to_string().contains("ended"), "{error}");
    }
}
