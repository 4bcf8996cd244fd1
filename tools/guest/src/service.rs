//! The guest's services over TCP. Every line is answered with one JSON object on a line:
//!
//! - port 7000, a session: a number, which comes back with the guest's counters;
//! - port 7001, commands: `stats` (the counters), `check` (check all pages, then the counters), `churn 64M` (write
//!   that much memory and free it, then the counters), `reboot`, `poweroff`.

use std::convert::Infallible;
use std::fmt::Display;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;

use rustix::time::{ClockId, clock_gettime};

use crate::boot;
use crate::check::Checkers;
use crate::options;

const SESSION_PORT: u16 = 7000;
const COMMAND_PORT: u16 = 7001;
/// The longest line that is read, in bytes.
const MAX_LINE_BYTES: u64 = 256;

/// Serves for ever.
pub(crate) fn serve(checkers: Arc<Checkers>, boot_id: String) -> Result<Infallible, String> {
    let guest = GuestService { checkers, boot_id: boot_id.into() };
    let commands = listen(COMMAND_PORT)?;
    let session = listen(SESSION_PORT)?;
    let same = guest.clone();
    std::thread::spawn(move || accept(&commands, move |stream| same.answer_commands(&stream)));
    accept(&session, move |stream| guest.answer_session(&stream))
}

#[derive(Clone)]
struct GuestService {
    checkers: Arc<Checkers>,
    boot_id: Arc<str>,
}

impl GuestService {
    fn answer_session(&self, stream: &TcpStream) -> io::Result<()> {
        each_line(stream, |line| match line.parse::<u64>() {
            Ok(number) => self.counters(&format_args!("\"message\":{number},")),
            Err(_) => error("send numbers, one a line"),
        })
    }

    fn answer_commands(&self, stream: &TcpStream) -> io::Result<()> {
        each_line(stream, |line| match line {
            "stats" => self.counters(&""),
            "check" => {
                self.checkers.check_all();
                self.counters(&"")
            }
            // The answer would hardly get out: who asks sees the connection end, and another boot_id later.
            "reboot" => boot::reboot(),
            "poweroff" => boot::power_off(),
            _ => match line.strip_prefix("churn ").and_then(options::bytes) {
                Some(bytes) => {
                    // Large enough that it is given back to the kernel, which then has pages to spare that hold something.
                    std::hint::black_box(vec![0xa5u8; bytes as usize]);
                    self.counters(&"")
                }
                None => error("commands are stats, check, churn BYTES, reboot and poweroff"),
            },
        })
    }

    fn counters(&self, before: &dyn Display) -> String {
        let (passes, failures) = self.checkers.counts();
        let uptime = clock_gettime(ClockId::Monotonic);
        format!(
            "{{{before}\"passes\":{passes},\"failures\":{failures},\"uptime_seconds\":{}.{:03},\"boot_id\":\"{}\"}}\n",
            uptime.tv_sec,
            uptime.tv_nsec / 1_000_000,
            self.boot_id,
        )
    }
}

fn error(text: &str) -> String {
    format!("{{\"error\":\"{text}\"}}\n")
}

fn listen(port: u16) -> Result<TcpListener, String> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .map_err(|error| format!("listening on port {port}: {error}"))
}

/// Serves every connection on a thread of its own.
fn accept<F>(listener: &TcpListener, serve: F) -> !
where
    F: Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
{
    loop {
        // An error is one of a connection that has gone already.
        if let Ok((stream, _)) = listener.accept() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    }
}

/// Answers every line until the connection ends.
fn each_line(stream: &TcpStream, mut answer: impl FnMut(&str) -> String) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = (BufReader::new(stream), stream);
    let mut line = String::new();
    loop {
        line.clear();
        if reader.by_ref().take(MAX_LINE_BYTES).read_line(&mut line)? == 0 {
            return Ok(());
        }
        writer.write_all(answer(line.trim()).as_bytes())?;
    }
}
