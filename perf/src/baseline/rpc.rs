//! The raw limit of a fault: how long a page takes that is asked for over an idle connection.
//!
//! A request of 16 bytes goes from host B to host A, and a page of 4 KiB comes back. There is a thread at either end
//! that waits in poll(2), as where faults are served, but no guest waits for a page, and none is placed.
//!
//! It matters where these threads run. On two hosts each has a processor of its own, which sleeps while it has nothing
//! to do, and is woken by what comes; so the figures are of two processors. If both ends share one, it never sleeps, and
//! the page comes several times sooner on a machine where waking is slow, as in a virtual machine. Left to itself the
//! scheduler does now this and now that. What one processor does is measured too: nothing can be quicker.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memlane_lab::{HostId, Lab};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

use crate::baseline::memory::SharedMemory;
use crate::report::{Waits, microseconds_within};

/// The size of an answer, in bytes.
const PAGE: usize = 4096;
/// The size of a request, in bytes: the number of a page, and as much again.
const REQUEST: usize = 16;
/// The number of pages that are asked for in turn, so that they are not all in the processor's nearest cache.
const PAGES: usize = 4096;
/// The number of requests before those that count.
const WARM_UP: usize = 200;
/// The number of requests that count.
const REQUESTS: usize = 5000;
/// The longest measurement. On slow ports it makes fewer requests.
const LONGEST: Duration = Duration::from_secs(5);
/// Longest wait for a request or an answer.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// The result of [`measure`], in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct RpcFigures {
    /// The number of pages that were asked for.
    pub rpc_requests: usize,
    /// The time within which half of the pages came.
    pub rpc_p50_us: f64,
    /// The time within which 99 of 100 pages came.
    pub rpc_p99_us: f64,
    /// The time within which all pages came.
    pub rpc_max_us: f64,
    /// The time within which half of the pages came, if both ends shared a processor.
    pub rpc_one_cpu_p50_us: f64,
    /// The time within which 99 of 100 pages came, if both ends shared a processor.
    pub rpc_one_cpu_p99_us: f64,
    /// The time that each page took, between two processors.
    #[serde(skip)]
    pub waits: Waits,
}

/// Asks host A of `lab` for pages from host B over the first port, one at a time, and compares what comes.
///
/// The time of each is from before its request is sent until its last byte is read.
///
/// # Errors
///
/// If the lab has no ports, the connection fails, or an answer is not the page that was asked for.
pub fn measure(lab: &Lab) -> Result<RpcFigures> {
    let port = lab.host(HostId::A).ports().first().context("measuring single pages needs a port")?;
    let memory = SharedMemory::with_pattern(PAGES * PAGE)?;
    let cpus = sched_getaffinity(None).context("asking which processors there are")?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu));
    let first = cpus.next().context("there is no processor")?;
    // A machine with a single one has no choice.
    let second = cpus.next().unwrap_or(first);
    let measure = |cpus| {
        let ends =
            connect(lab, port.address).with_context(|| format!("connecting over {}", port.interface))?;
        times(ends, &memory, cpus)
    };
    Ok(RpcFigures::new(measure([first, second])?, measure([first, first])?))
}

impl RpcFigures {
    /// Makes the figures from the times between two processors and on one. There must be some of each.
    pub(crate) fn new(mut two: Vec<Duration>, mut one: Vec<Duration>) -> Self {
        two.sort_unstable();
        one.sort_unstable();
        let within = microseconds_within;
        Self {
            rpc_requests: two.len(),
            rpc_p50_us: within(&two, 50),
            rpc_p99_us: within(&two, 99),
            rpc_max_us: within(&two, 100),
            rpc_one_cpu_p50_us: within(&one, 50),
            rpc_one_cpu_p99_us: within(&one, 99),
            waits: Waits::of(&two),
        }
    }
}

impl fmt::Display for RpcFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rpc_requests, rpc_p50_us, rpc_p99_us, rpc_max_us, .. } = self;
        let Self { rpc_one_cpu_p50_us, rpc_one_cpu_p99_us, .. } = self;
        write!(
            f,
            "a page of 4 KiB, asked for alone: {rpc_p50_us:.0} µs in the median, {rpc_p99_us:.0} µs in 99 of 100, \
             {rpc_max_us:.0} µs at most, of {rpc_requests}; with both ends on one processor {rpc_one_cpu_p50_us:.0} µs \
             and {rpc_one_cpu_p99_us:.0} µs"
        )
    }
}

/// Measures the time of each page between the end that asks and the end that answers, on these processors.
fn times(
    (mut asking, answering): (TcpStream, TcpStream),
    memory: &[u8],
    [ask_on, answer_on]: [usize; 2],
) -> Result<Vec<Duration>> {
    std::thread::scope(|scope| {
        let answerer = scope.spawn(move || stay_on(answer_on).and_then(|()| answer_all(answering, memory)));
        // On a thread of its own, for it is the thread that stays; the other end goes on until this one is closed.
        let asker = scope.spawn(move || stay_on(ask_on).and_then(|()| ask_all(&mut asking, memory)));
        let times = asker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let answered = answerer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // If both have failed, the one that answers failed first.
        answered.context("answering")?;
        times.context("asking")
    })
}

/// Keeps this thread on a processor.
fn stay_on(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).with_context(|| format!("moving to processor {cpu}"))
}

/// Connects the end that asks, on host B, and the end that answers.
fn connect(lab: &Lab, address: Ipv4Addr) -> Result<(TcpStream, TcpStream)> {
    let listener = lab.host(HostId::A).run_in(|| TcpListener::bind((address, 0)))??;
    let address = listener.local_addr()?;
    let asking = lab.host(HostId::B).run_in(|| TcpStream::connect(address))??;
    let (answering, _) = listener.accept()?;
    for end in [&asking, &answering] {
        end.set_nodelay(true)?;
    }
    Ok((asking, answering))
}

fn ask_all(socket: &mut TcpStream, memory: &[u8]) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(REQUESTS);
    let mut answer = [0; PAGE];
    let begin = Instant::now();
    for number in 0..WARM_UP + REQUESTS {
        // An odd stride reaches all pages of a power of two, and never the next one.
        let page = number * 1237 % PAGES;
        let start = Instant::now();
        socket.write_all(&request(page))?;
        ensure!(read_exact(socket, &mut answer)?, "the other end has closed the connection");
        let elapsed = start.elapsed();
        ensure!(answer == memory[page * PAGE..][..PAGE], "another page came than number {page}");
        if number >= WARM_UP || begin.elapsed() > LONGEST / 5 {
            times.push(elapsed);
        }
        if begin.elapsed() > LONGEST && !times.is_empty() {
            break;
        }
    }
    Ok(times)
}

/// Answers until the other end closes the connection.
fn answer_all(mut socket: TcpStream, memory: &[u8]) -> Result<()> {
    let mut request = [0; REQUEST];
    while read_exact(&mut socket, &mut request)? {
        let (page, _) = request.split_at(size_of::<u64>());
        let page = u64::from_le_bytes(page.try_into().expect("the half of a request is a number"));
        let start = usize::try_from(page).ok().and_then(|page| page.checked_mul(PAGE));
        let bytes = start.and_then(|start| memory.get(start..)?.get(..PAGE));
        socket.write_all(bytes.with_context(|| format!("there is no page {page}"))?)?;
    }
    Ok(())
}

fn request(page: usize) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    request[..size_of::<u64>()].copy_from_slice(&(page as u64).to_le_bytes());
    request
}

/// Fills `buffer`, waiting in poll(2) before each read; returns false if the other end has closed before its first
/// byte.
fn read_exact(socket: &mut TcpStream, buffer: &mut [u8]) -> Result<bool> {
    let mut read = 0;
    while read < buffer.len() {
        match poll(&mut [PollFd::new(&*socket, PollFlags::IN)], Some(&PATIENCE)) {
            Ok(0) => bail!("nothing came for {} s", PATIENCE.tv_sec),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("waiting for a socket"),
        }
        match socket.read(&mut buffer[read..]) {
            Ok(0) if read == 0 => return Ok(false),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(bytes) => read += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("reading from a socket"),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let asking = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        (asking, listener.accept().expect("a connection").0)
    }

    #[test]
    fn pages_come_as_asked() {
        let memory = SharedMemory::with_pattern(PAGES * PAGE).expect("memory");
        let cpus = sched_getaffinity(None).expect("processors");
        let cpu = (0..CpuSet::MAX_CPU).find(|cpu| cpus.is_set(*cpu)).expect("a processor");
        let times = times(pair(), &memory, [cpu, cpu]).expect("answers");
        assert!(!times.is_empty() && times.len() <= REQUESTS);
    }

    #[test]
    fn what_is_not_there_or_is_cut_off_is_an_error() {
        let memory = [0; PAGE];
        for (sent, words) in [(&request(1)[..], "no page 1"), (&request(0)[..3], "end of file")] {
            let (mut asking, answering) = pair();
            asking.write_all(sent).expect("a send");
            asking.shutdown(std::net::Shutdown::Write).expect("a shutdown");
            let error = answer_all(answering, &memory).expect_err("no request that can be answered");
            assert!(format!("{error:#}").contains(words), "{error:#}");
        }
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let times = |times: &[u64]| times.iter().copied().map(Duration::from_micros).collect();
        let thousand: Vec<u64> = (1..=1000).rev().collect();
        let many = RpcFigures::new(times(&thousand), times(&[7]));
        assert_eq!((many.rpc_one_cpu_p50_us, many.rpc_one_cpu_p99_us), (7.0, 7.0));
        let found = [many.rpc_p50_us, many.rpc_p99_us, many.rpc_max_us].map(f64::round);
        assert_eq!((found, many.rpc_requests), ([500.0, 990.0, 1000.0], 1000));
    }
}
