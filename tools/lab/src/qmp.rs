//! A connection of the harness with the QMP monitor of a QEMU, on a Unix socket: [`memlane_qmp`] reads and writes its
//! lines.
//!
//! QEMU tells its events to every monitor, so this one also hears what happens to a guest that a daemon moves.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use memlane_qmp::{Commands, Decoder, Event, Message, NEGOTIATE};
use serde_json::{Value, json};

use crate::wait_for;

/// Longest wait for a QEMU that starts: it may take all RAM from the host first.
const START: Duration = Duration::from_secs(60);
/// Longest wait for the answer to a command.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection with a QEMU's monitor, which talks to one client at a time.
pub struct Monitor {
    stream: UnixStream,
    decoder: Decoder,
    commands: Commands,
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
        Self::over(stream).with_context(|| format!("greeting the monitor at {}", socket.display()))
    }

    /// Waits for a QEMU that connects its monitor by itself (`-chardev socket,server=off`).
    ///
    /// # Errors
    ///
    /// If none does so for a minute, or what does is no monitor.
    pub fn accept(listener: &UnixListener) -> Result<Self> {
        listener.set_nonblocking(true).context("listening without waiting")?;
        let (stream, _) = wait_for("a QEMU's monitor", START, || listener.accept().ok())?;
        stream.set_nonblocking(false).context("waiting for what it says")?;
        Self::over(stream)
    }

    fn over(stream: UnixStream) -> Result<Self> {
        let (decoder, commands) = (Decoder::default(), Commands::default());
        let mut monitor = Self { stream, decoder, commands, events: VecDeque::new(), ahead: 0.0 };
        let first = monitor.next(ANSWER)?.context("QEMU's monitor says nothing")?;
        ensure!(matches!(first, Message::Greeting(_)), "this is no QMP monitor: it says {first:?}");
        monitor.execute(NEGOTIATE, json!({}))?;
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
        let (id, line) = self.commands.encode(command, &arguments);
        let order = line.trim_end();
        let failed = || format!("QEMU's {command}");
        self.stream.write_all(line.as_bytes()).with_context(failed)?;
        let until = Instant::now() + ANSWER;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let message =
                self.next(left).with_context(failed)?.with_context(|| format!("no answer to {order}"))?;
            match message {
                Message::Event(event) => self.events.push_back(QmpEvent::of(event, self.ahead)?),
                Message::Answer(answer) if answer.is_to(id) => {
                    return answer.outcome.map_err(|refusal| anyhow!("QEMU refuses {order}: {refusal}"));
                }
                // An answer that came too late.
                Message::Answer(_) => {}
                Message::Greeting(_) => bail!("QEMU greets twice"),
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
            match message {
                Message::Event(event) if event.name == name => {
                    return QmpEvent::of(event, self.ahead).map(Some);
                }
                Message::Event(event) => self.events.push_back(QmpEvent::of(event, self.ahead)?),
                // Its command was given up.
                Message::Answer(_) => {}
                message @ Message::Greeting(_) => bail!("QEMU greets again: {message:?}"),
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

    /// Returns the next message; `None` if it does not come within `timeout`.
    fn next(&mut self, timeout: Duration) -> Result<Option<Message>> {
        let until = Instant::now() + timeout;
        let mut buffer = [0; 8 << 10];
        loop {
            if let Some(message) = self.decoder.next_message().context("reading from QEMU's monitor")? {
                return Ok(Some(message));
            }
            // A timeout of 0 would be none at all.
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("QEMU has ended"),
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error).context("reading from QEMU's monitor"),
            }
        }
    }
}

impl QmpEvent {
    fn of(event: Event, ahead: f64) -> Result<Self> {
        let Event { name, data, at } = event;
        let at = at.with_context(|| format!("QEMU does not say when {name} was"))?;
        Ok(Self { name, data, at: at.as_secs_f64() - ahead })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
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
