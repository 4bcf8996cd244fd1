//! The connection with the QMP monitor of a QEMU, on a Unix socket: [`memlane_qmp`] reads and writes its lines
//! (QEMU's commands are in `qemu-qmp-ref`).

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use memlane_kvm::{descriptors, packet};
use memlane_net::task;
use memlane_net::unix_socket::{Peer, peer};
use memlane_qmp::{Commands, Message, NEGOTIATE};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, oneshot};

use self::news::{Messages, News};
use self::silence::Silence;
use crate::process::Hang;
use crate::{DriverError, Farewell};

mod news;
mod silence;

/// Longest wait for the answer to a command.
const PATIENCE: Duration = Duration::from_secs(10);
/// The greeting is waited for this long: QEMU talks to one client at a time, and lets others wait.
const GREETING: Duration = Duration::from_secs(5);

/// QEMU cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No process listens on the socket.
    #[error(
        "cannot connect to QEMU's monitor at {}: {source}; start QEMU with -qmp unix:PATH,server=on,wait=off, \
         and let the daemon's user write to that socket",
        path.display()
    )]
    Connect {
        /// This is the socket.
        path: PathBuf,
        /// This is what the kernel said.
        source: io::Error,
    },
    /// The process that listens does not greet.
    #[error(
        "QEMU's monitor at {} says nothing{}",
        path.display(),
        match hang {
            Hang::Unknown => ": another program may be connected to it (it serves one at a time); give this \
                daemon a -qmp socket of its own".to_owned(),
            hang => hang.to_string(),
        }
    )]
    Silent {
        /// This is the socket.
        path: PathBuf,
        /// This is why, as far as it can be seen.
        hang: Hang,
    },
    /// The process that listens is no QEMU.
    #[error(
        "what listens at {} is no QMP monitor: {why}; give the socket of QEMU's -qmp, not that of -monitor",
        path.display()
    )]
    NotQmp {
        /// This is the socket.
        path: PathBuf,
        /// This is what is wrong.
        why: String,
    },
}

/// A connection to a QEMU that listens to this daemon.
pub(super) struct Qmp {
    writer: OwnedWriteHalf,
    /// One command at a time.
    commands: Mutex<Commands>,
    /// A command was written in part, by somebody who then gave up: nothing that follows it would
    /// be understood.
    torn: Cell<bool>,
    news: Rc<News>,
    pid: u32,
    user: u32,
    version: [u32; 3],
    /// The answer to a command is waited for this long, also that of a QEMU that is stopped. It is `None` as a rule.
    patience: Cell<Option<Duration>>,
    silence: RefCell<Option<Silence>>,
}

impl Qmp {
    /// Connects, and leaves the negotiation mode.
    ///
    /// # Errors
    ///
    /// Fails if no QEMU listens at `path`, or if it does not greet in time.
    pub(super) async fn connect(path: &Path) -> Result<Self, ConnectError> {
        Self::connect_within(path, (GREETING, PATIENCE)).await
    }

    /// Connects as [`Self::connect`] does, to a QEMU that may take so long for its greeting, and for its first answer.
    pub(super) async fn connect_within(
        path: &Path,
        (greeting, patience): (Duration, Duration),
    ) -> Result<Self, ConnectError> {
        let refused =
            |source| ConnectError::Connect { path: path.to_owned(), source: descriptors::explain(source) };
        let stranger = |why: &str| ConnectError::NotQmp { path: path.to_owned(), why: why.to_owned() };
        let stream = UnixStream::connect(path).await.map_err(refused)?;
        let Peer { pid, uid: user } = peer(&stream).map_err(refused)?;
        let (reader, writer) = stream.into_split();
        let mut messages = Messages::new(reader);
        let silent = |_| ConnectError::Silent { path: path.to_owned(), hang: Hang::of(pid) };
        let first = tokio::time::timeout(greeting, messages.next()).await.map_err(silent)?;
        let first = first.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => stranger(&error.to_string()),
            _ => refused(error),
        })?;
        let version = match first.ok_or_else(|| stranger("it hung up"))? {
            Message::Greeting(greeting) => greeting.version,
            _ => None,
        };
        let version = version.ok_or_else(|| stranger("its greeting has no version of QEMU"))?;
        let news = Rc::new(News::default());
        task::spawn("monitor of a QEMU", news::read(messages, news.clone()));
        let (commands, torn, patient, silence) = Default::default();
        let qmp = Self { writer, commands, torn, news, pid, user, version, patience: patient, silence };
        match qmp.run(NEGOTIATE, json!({}), &[], patience).await {
            Ok(_) => Ok(qmp),
            Err(error) => Err(stranger(&error.to_string())),
        }
    }

    /// Returns the number of QEMU's process, which is the one that made the socket.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the user id of QEMU's process.
    pub(super) fn user(&self) -> u32 {
        self.user
    }

    /// Returns QEMU's version: major, minor, micro.
    pub(super) fn version(&self) -> [u32; 3] {
        self.version
    }

    /// Runs a command, and returns its result.
    ///
    /// # Errors
    ///
    /// Fails if QEMU is gone, refuses, or does not answer in time.
    pub(super) async fn execute(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, DriverError> {
        self.run(command, arguments, &[], self.patience()).await
    }

    /// Gives QEMU a descriptor, which `fd:NAME` stands for from now on.
    ///
    /// # Errors
    ///
    /// Fails if QEMU is gone, refuses, or does not answer in time.
    pub(super) async fn give(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<(), DriverError> {
        self.run("getfd", json!({ "fdname": name }), &[descriptor], self.patience()).await.map(drop)
    }

    /// Runs a command of the human monitor, for what QMP has no command.
    ///
    /// # Errors
    ///
    /// Fails if QEMU is gone, refuses, or does not answer in time.
    pub(super) async fn human(&self, line: &str) -> Result<String, DriverError> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line })).await?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Returns the status of the guest, such as `running`.
    ///
    /// # Errors
    ///
    /// Fails if QEMU is gone, refuses, or does not answer in time.
    pub(super) async fn status(&self) -> Result<String, DriverError> {
        let status = self.execute("query-status", json!({})).await?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Returns the state of QEMU's own migration, such as `completed`, or an empty text if there never was one.
    ///
    /// # Errors
    ///
    /// Fails if QEMU is gone, refuses, or does not answer in time.
    pub(super) async fn migration(&self) -> Result<String, DriverError> {
        let migration = self.execute("query-migrate", json!({})).await?;
        Ok(migration["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Returns how many bytes of memory QEMU's own migration has still to write.
    ///
    /// # Errors
    ///
    /// Fails if QEMU is gone, refuses, or does not answer in time.
    pub(super) async fn state_left(&self) -> Result<u64, DriverError> {
        let migration = self.execute("query-migrate", json!({})).await?;
        Ok(migration["ram"]["remaining"].as_u64().unwrap_or_default())
    }

    /// Forgets the events so far, before a migration is begun.
    pub(super) fn expect_migration(&self) {
        self.news.migration.send_replace(String::new());
    }

    /// Waits for an event that says that QEMU's own migration is in one of these `states`. An error names `request`.
    ///
    /// # Errors
    ///
    /// Fails if QEMU is gone, or if no such event comes within `patience`.
    pub(super) async fn migration_reaches(
        &self,
        states: &[&str],
        request: &'static str,
        patience: Duration,
    ) -> Result<String, DriverError> {
        let mut migration = self.news.migration.subscribe();
        let reached = migration.wait_for(|state| states.contains(&state.as_str()));
        tokio::select! {
            reached = tokio::time::timeout(patience, reached) => match reached {
                Ok(Ok(state)) => Ok(state.clone()),
                Ok(Err(_)) => Err(DriverError::Gone),
                Err(_) => Err(DriverError::Slow { request, after: patience, hang: Hang::of(self.pid) }),
            },
            () = self.gone() => Err(DriverError::Gone),
        }
    }

    /// Tells whether the connection is known to be lost.
    pub(super) fn is_gone(&self) -> bool {
        *self.news.gone.borrow()
    }

    /// Returns when the last vCPU stood still, as QEMU saw it, in Unix time.
    pub(super) fn stopped(&self) -> Option<Duration> {
        self.news.stopped.get()
    }

    /// Returns when the vCPUs were let go last, as QEMU saw it, in Unix time.
    pub(super) fn resumed(&self) -> Option<Duration> {
        self.news.resumed.get()
    }

    /// Returns how QEMU said that it comes to its end.
    pub(super) fn farewell(&self) -> Option<Farewell> {
        self.news.farewell.borrow().clone()
    }

    /// Returns once the connection is lost.
    pub(super) async fn gone(&self) {
        // The reading task sets it last.
        let _ = self.news.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Ends the connection, which does not affect QEMU.
    pub(super) fn hang_up(&self) {
        memlane_lane::socket::hang_up(self.writer.as_ref());
        self.news.gone.send_replace(true);
    }

    async fn run(
        &self,
        command: &'static str,
        arguments: Value,
        descriptors: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<Value, DriverError> {
        let mut commands = self.commands.lock().await;
        if self.torn.get() {
            self.hang_up();
        }
        if self.is_gone() {
            return Err(DriverError::Gone);
        }
        let (id, line) = commands.encode(command, &arguments);
        let (sender, answer) = oneshot::channel();
        *self.news.waiting.borrow_mut() = Some((id, sender));
        let exchange = async {
            self.write(line.as_bytes(), descriptors).await.map_err(|_| DriverError::Gone)?;
            answer.await.map_err(|_| DriverError::Gone)
        };
        match self.answer_within(patience, command, exchange).await? {
            Ok(value) => Ok(value),
            Err(refusal) => Err(DriverError::Failed { request: command, reason: refusal.description }),
        }
    }

    /// Writes a line; the descriptors go with its first bytes.
    async fn write(&self, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let stream: &UnixStream = self.writer.as_ref();
        let mut written = 0;
        while written < line.len() {
            stream.writable().await?;
            let with = if written == 0 { descriptors } else { &[] };
            let rest = &line[written..];
            match stream.try_io(Interest::WRITABLE, || packet::send_some(stream, rest, with)) {
                Ok(count) => {
                    written += count;
                    self.torn.set(written < line.len());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Returns the items of a list that a command returned, or none if it is no list.
pub(super) fn items(list: &Value) -> &[Value] {
    list.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Tells whether QEMU migrates by its own means, by the state that [`Qmp::migration`] returns.
pub(super) fn is_migrating(state: &str) -> bool {
    !matches!(state, "" | "none" | "completed" | "failed" | "cancelled")
}

impl Drop for Qmp {
    fn drop(&mut self) {
        memlane_lane::socket::hang_up(self.writer.as_ref());
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 1}}}}"#;

    /// Connects to a monitor that says `greeting`, and one of `answers` after each command, with the number of the
    /// command in the place of `ID`; then it ends. Returns what `ask` does with the connection.
    fn with_monitor<T>(
        greeting: &'static str,
        answers: &'static [&'static str],
        ask: impl AsyncFnOnce(Result<Qmp, ConnectError>) -> T,
    ) -> T {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let monitor = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut commands = std::io::BufReader::new(stream.try_clone().unwrap()).lines();
            write!(stream, "{greeting}\r\n").unwrap();
            for answer in answers {
                let Some(Ok(command)) = commands.next() else { break };
                let id = serde_json::from_str::<Value>(&command).unwrap()["id"].to_string();
                write!(stream, "{}\r\n", answer.replace("ID", &id)).unwrap();
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let asked =
            tokio::task::LocalSet::new().block_on(&runtime, async { ask(Qmp::connect(&path).await).await });
        monitor.join().unwrap();
        asked
    }

    #[test]
    fn events_come_at_any_time_and_answers_are_told_apart() {
        const ANSWERS: &[&str] = &[
            r#"{"return": {}, "id": ID}"#,
            concat!(
                r#"{"return": {"status": "late"}, "id": 0}"#,
                "\r\n",
                r#"{"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 250000}}"#,
                "\r\n",
                r#"{"event": "MIGRATION", "data": {"status": "setup"}, "timestamp": {"seconds": 8, "microseconds": 0}}"#,
                "\r\n",
                r#"{"return": {"status": "paused"}, "id": ID}"#,
            ),
            r#"{"error": {"class": "GenericError", "desc": "no \u001bthing"}, "id": ID}"#,
        ];
        with_monitor(GREETING, ANSWERS, async |qmp| {
            let qmp = qmp.unwrap();
            assert_eq!((qmp.version(), qmp.pid()), ([7, 2, 1], std::process::id()));
            assert_eq!(qmp.status().await.unwrap(), "paused");
            assert_eq!(qmp.stopped(), Some(Duration::from_millis(7250)));
            assert_eq!(qmp.migration_reaches(&["setup"], "migrate", PATIENCE).await.unwrap(), "setup");
            let refusal = qmp.execute("fly", json!({})).await.unwrap_err();
            assert!(
                matches!(&refusal, DriverError::Failed { request: "fly", reason } if reason == "no \u{fffd}thing")
            );
            qmp.gone().await;
            assert!(matches!(qmp.status().await, Err(DriverError::Gone)));
        });
    }

    #[test]
    fn what_is_no_monitor_is_told() {
        for (greeting, why) in [
            ("QEMU 10.0.2 monitor - type 'help' for more information", "which is not JSON"),
            (r#"{"QMP": {}}"#, "no version of QEMU"),
            (GREETING, DriverError::Gone.to_string().as_str()),
        ] {
            let error = with_monitor(greeting, &[], async |qmp| qmp.err()).expect("no monitor").to_string();
            assert!(error.contains("no QMP monitor") && error.contains(why), "{error}");
        }
    }
}
