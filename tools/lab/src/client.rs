//! A client of a Linux guest: it sends messages all the time, and notes how long it waits for answers.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lan::Lan;
use crate::wait::wait_for;

const SESSION_PORT: u16 = 7000;
const COMMAND_PORT: u16 = 7001;
/// The time between two messages.
const PERIOD: Duration = Duration::from_millis(5);
/// An attempt to connect is given up after this long; the guest may be booting.
const ATTEMPT: Duration = Duration::from_secs(1);
/// The longest wait for an answer. A check of all memory takes long on an emulated processor.
const ANSWER: Duration = Duration::from_secs(300);

/// One TCP connection with a guest, on which a message is sent every 5 ms whether or not the last one was answered.
#[derive(Debug)]
pub struct ClientSession {
    stream: Arc<TcpStream>,
    seen: Arc<Mutex<Heard>>,
    threads: Vec<JoinHandle<()>>,
}

/// The counters that a guest reports about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestCounters {
    /// The number of pages that were checked and found as they should be.
    pub passes: u64,
    /// The number of pages that were checked and found different.
    pub failures: u64,
    /// The time since the guest has booted, by its own clock.
    pub uptime: Duration,
    /// An identity that is different for each boot of the guest.
    pub boot_id: String,
}

#[derive(Debug)]
struct Heard {
    sent: u64,
    answered: u64,
    last_answer: Instant,
    longest_gap: Duration,
    counters: Option<GuestCounters>,
    ended: Option<String>,
}

impl ClientSession {
    /// Connects to the guest at `address`, and begins to talk.
    ///
    /// # Errors
    ///
    /// If the guest does not answer within `timeout`.
    pub fn open(lan: &Lan, address: Ipv4Addr, timeout: Duration) -> Result<Self> {
        let stream = Arc::new(connect(lan, (address, SESSION_PORT).into(), timeout)?);
        let seen = Heard {
            sent: 0,
            answered: 0,
            last_answer: Instant::now(),
            longest_gap: Duration::ZERO,
            counters: None,
            ended: None,
        };
        let seen = Arc::new(Mutex::new(seen));
        let begin = |work: fn(&TcpStream, &Mutex<Heard>) -> Result<()>| {
            let (stream, seen) = (stream.clone(), seen.clone());
            std::thread::spawn(move || {
                if let Err(error) = work(&stream, &seen) {
                    lock(&seen).ended.get_or_insert(format!("{error:#}"));
                    // So that the other thread ends too. Fails where the connection has gone.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            })
        };
        let threads = vec![begin(talk), begin(listen)];
        Ok(Self { stream, seen, threads })
    }

    /// Waits until a message that is sent from now on has been answered, and returns what the answer said.
    ///
    /// # Errors
    ///
    /// If the connection has ended, or no answer comes within `timeout`.
    pub fn hear(&self, timeout: Duration) -> Result<GuestCounters> {
        let sent = lock(&self.seen).sent;
        let heard = wait_for("an answer of the guest", timeout, || {
            let seen = lock(&self.seen);
            let counters = seen.counters.as_ref().filter(|_| seen.answered > sent);
            match (&seen.ended, counters) {
                (Some(why), _) => Some(Err(why.clone())),
                (None, counters) => Some(Ok(counters?.clone())),
            }
        });
        match heard? {
            Ok(counters) => Ok(counters),
            Err(why) => bail!("the connection with the guest has ended: {why}"),
        }
    }

    /// Returns the longest time between two answers since the last call, including the time since the latest answer.
    pub fn take_longest_gap(&self) -> Duration {
        let mut seen = lock(&self.seen);
        let waiting = seen.last_answer.elapsed();
        std::mem::take(&mut seen.longest_gap).max(waiting)
    }
}

impl Drop for ClientSession {
    fn drop(&mut self) {
        // Fails where the connection has ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl GuestCounters {
    /// Gives the guest at `address` a command on a connection of its own: `stats`, or `check` to have it check all
    /// its memory first.
    ///
    /// # Errors
    ///
    /// If the guest does not answer.
    pub fn ask(lan: &Lan, address: Ipv4Addr, command: &str) -> Result<Self> {
        let stream = connect(lan, (address, COMMAND_PORT).into(), ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        (&stream).write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(&stream)
            .read_line(&mut line)
            .with_context(|| format!("asking the guest to {command}"))?;
        Self::parse(&line).map(|(_, counters)| counters)
    }

    /// Parses an answer: the number of the message that was answered, if it answers one, and the counters.
    fn parse(line: &str) -> Result<(Option<u64>, Self)> {
        let value: Value = serde_json::from_str(line).with_context(|| format!("the guest said {line:?}"))?;
        let counters = || {
            Some(Self {
                passes: value["passes"].as_u64()?,
                failures: value["failures"].as_u64()?,
                uptime: Duration::try_from_secs_f64(value["uptime_seconds"].as_f64()?).ok()?,
                boot_id: value["boot_id"].as_str()?.to_owned(),
            })
        };
        let counters = counters().with_context(|| format!("the guest said {line:?}"))?;
        Ok((value["message"].as_u64(), counters))
    }
}

/// Makes the guest at `address` reset itself (`reboot`) or switch itself off (`poweroff`).
///
/// # Errors
///
/// If the guest cannot be told.
pub fn tell_guest(lan: &Lan, address: Ipv4Addr, command: &str) -> Result<()> {
    let stream = connect(lan, (address, COMMAND_PORT).into(), ANSWER)?;
    (&stream)
        .write_all(format!("{command}\n").as_bytes())
        .with_context(|| format!("telling the guest to {command}"))
}

fn connect(lan: &Lan, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let mut last = None;
    let connected = wait_for("the guest", timeout, || {
        let tried =
            lan.run_in_client(|| TcpStream::connect_timeout(&address, ATTEMPT).map_err(anyhow::Error::from));
        tried.and_then(|connected| connected).map_err(|error| last = Some(error)).ok()
    });
    let stream = connected.with_context(|| {
        let last = last.map(|error| format!(": {error}")).unwrap_or_default();
        format!("connecting to {address}{last}")
    })?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn talk(mut stream: &TcpStream, seen: &Mutex<Heard>) -> Result<()> {
    loop {
        let number = {
            let mut seen = lock(seen);
            seen.sent += 1;
            seen.sent
        };
        stream.write_all(format!("{number}\n").as_bytes()).context("sending to the guest")?;
        std::thread::sleep(PERIOD);
    }
}

fn listen(stream: &TcpStream, seen: &Mutex<Heard>) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line).context("hearing the guest")? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).context("hearing the guest");
        }
        let (number, counters) = GuestCounters::parse(&line)?;
        let mut seen = lock(seen);
        if number != Some(seen.answered + 1) {
            bail!("message {} was to be answered next, and {number:?} was", seen.answered + 1);
        }
        seen.answered += 1;
        seen.longest_gap = seen.longest_gap.max(seen.last_answer.elapsed());
        seen.last_answer = Instant::now();
        seen.counters = Some(counters);
    }
}

fn lock(seen: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    // Nothing panics under the lock; if it did, numbers would still be numbers.
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
