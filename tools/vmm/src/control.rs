//! The control socket: one JSON object a line, asked and answered over a Unix stream.
//!
//! ```text
//! {"do":"stats"}         -> {"ok": Stats}
//! {"do":"reset-stalls"}  -> {"ok": null}
//! {"do":"verify"}        -> {"ok": Report}
//! {"do":"quit"}          -> {"ok": null}
//! {"do":"follow","every_us":2000}  -> {"ok": Progress}, again and again while there is a guest here
//! anything wrong         -> {"error": "why"}
//! ```
//!
//! A client that follows a guest need not read each answer as it comes: the socket holds some hundreds.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::oracle::OracleReport;
use crate::run_state::RunState;
use crate::statistics::{GuestProgress, Stats};
use crate::vmm::{GuestView, GuestVmm};

/// The length of the longest request, in bytes.
const MAX_REQUEST: u64 = 4096;
/// The length of the longest answer, in bytes.
const MAX_ANSWER: u64 = 4 << 20;
/// The shortest time between two reports of the guest's progress, in microseconds.
const LEAST_EVERY_US: u64 = 100;

#[derive(Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
enum ControlRequest {
    Stats,
    ResetStalls,
    Verify,
    Quit,
    Follow { every_us: u64 },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ControlAnswer {
    Ok(Value),
    Error(String),
}

/// Serves the control socket at `path`, which must not exist, from a thread of its own. A request
/// to quit is passed to `quit`.
pub fn serve(
    path: &Path,
    vmm: Arc<Mutex<GuestVmm>>,
    observer: Arc<GuestView>,
    quit: Sender<()>,
) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let accept = move || {
        for stream in listener.incoming().flatten() {
            let (vmm, observer, quit) = (Arc::clone(&vmm), Arc::clone(&observer), quit.clone());
            let serve = move || {
                if let Err(error) = serve_client(stream, &vmm, &observer, &quit) {
                    tracing::debug!(%error, "control connection ended");
                }
            };
            if let Err(error) = std::thread::Builder::new().name("control".into()).spawn(serve) {
                tracing::warn!(%error, "cannot serve a control connection");
            }
        }
    };
    std::thread::Builder::new().name("control".into()).spawn(accept)?;
    Ok(())
}

fn serve_client(
    mut stream: UnixStream,
    vmm: &Mutex<GuestVmm>,
    observer: &GuestView,
    quit: &Sender<()>,
) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(line) = read_line(&mut reader, MAX_REQUEST)? {
        let answer = match serde_json::from_slice(&line) {
            Ok(ControlRequest::Follow { every_us }) => {
                return follow(&mut stream, observer, Duration::from_micros(every_us.max(LEAST_EVERY_US)));
            }
            Ok(request) => answer(request, vmm, observer, quit),
            Err(error) => Err(format!("the request is not understood: {error}")),
        };
        say(&mut stream, answer)?;
    }
    Ok(())
}

/// Reports the guest's progress until the guest is given up or the client has closed the connection.
fn follow(stream: &mut UnixStream, observer: &GuestView, every: Duration) -> io::Result<()> {
    let mut next = Instant::now();
    loop {
        match observer.standing() {
            RunState::Running | RunState::Paused => {
                let progress = serde_json::to_value(observer.progress());
                say(stream, progress.map_err(|error| error.to_string()))?;
            }
            // Its memory is not all here, and looking at it would wait for it.
            RunState::Incoming | RunState::Loaded => {}
            RunState::Discarded => return Ok(()),
        }
        // What was missed is not made up for.
        next = (next + every).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn say(stream: &mut UnixStream, answer: Result<Value, String>) -> io::Result<()> {
    let mut line = serde_json::to_vec(&answer.map_or_else(ControlAnswer::Error, ControlAnswer::Ok))?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn answer(
    request: ControlRequest,
    vmm: &Mutex<GuestVmm>,
    observer: &GuestView,
    quit: &Sender<()>,
) -> Result<Value, String> {
    let value = match request {
        ControlRequest::Stats => serde_json::to_value(observer.stats()),
        ControlRequest::ResetStalls => {
            observer.reset_stalls();
            Ok(Value::Null)
        }
        ControlRequest::Verify => serde_json::to_value(observer.verify(vmm)?),
        ControlRequest::Quit => {
            // The program may be ending already; then there is nobody to tell.
            let _ = quit.send(());
            Ok(Value::Null)
        }
        ControlRequest::Follow { .. } => unreachable!("it has many answers, which are given elsewhere"),
    };
    value.map_err(|error| format!("the answer cannot be written: {error}"))
}

/// A client of a VMM's control socket.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects to the VMM whose control socket is at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(path)?) })
    }

    /// Asks for the guest's statistics.
    pub fn stats(&mut self) -> io::Result<Stats> {
        self.ask(&ControlRequest::Stats)
    }

    /// Makes the VMM forget the stalls so far.
    pub fn reset_stalls(&mut self) -> io::Result<()> {
        self.ask(&ControlRequest::ResetStalls)
    }

    /// Makes the VMM compare all of RAM with the model; the guest is paused meanwhile.
    pub fn verify(&mut self) -> io::Result<OracleReport> {
        self.ask(&ControlRequest::Verify)
    }

    /// Ends the VMM.
    pub fn quit(&mut self) -> io::Result<()> {
        self.ask(&ControlRequest::Quit)
    }

    /// Makes the VMM report the guest's progress once in each period `every`, as long as it has a guest.
    pub fn follow(mut self, every: Duration) -> io::Result<impl Iterator<Item = io::Result<GuestProgress>>> {
        self.send(&ControlRequest::Follow { every_us: every.as_micros() as u64 })?;
        Ok(std::iter::from_fn(move || match self.receive() {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            answer => Some(answer),
        }))
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &ControlRequest) -> io::Result<T> {
        self.send(request)?;
        self.receive()
    }

    fn send(&mut self, request: &ControlRequest) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)
    }

    fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let line = read_line(&mut self.stream, MAX_ANSWER)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match serde_json::from_slice(&line)? {
            ControlAnswer::Ok(value) => Ok(serde_json::from_value(value)?),
            ControlAnswer::Error(reason) => Err(io::Error::other(reason)),
        }
    }
}

/// Reads a line and returns it without its end; `None` after the last one.
fn read_line(reader: &mut impl BufRead, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.by_ref().take(most).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) if line.len() as u64 + 1 >= most => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line is longer than {most} bytes")))
        }
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
