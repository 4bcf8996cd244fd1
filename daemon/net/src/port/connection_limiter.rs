//! This module limits the connections that have not said yet what they want.
//!
//! Every host that can connect can be silent. So a connection that has not introduced itself holds nothing that another
//! would wait for: each address has a share of the places, and where that is full the connection that has been silent
//! longest makes way for the newest.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Shutdown};
use std::rc::{Rc, Weak};

use tokio_uring::net::TcpStream;
use tracing::{info, warn};

use crate::link::LinkError;
use crate::log_limiter::LogLimiter;

/// This many connections of one address may be introducing themselves.
const SHARE: usize = 64;
/// This many connections of all addresses together may be introducing themselves.
const PLACES: usize = 512;
/// This many connections of one address may stay once they have introduced themselves.
const STAYING: usize = 64;

/// Decides which connections are let in.
#[derive(Default)]
pub struct ConnectionLimiter {
    inner: RefCell<Inner>,
    told: RefCell<LogLimiter<(IpAddr, String)>>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    /// These are the connections that have not introduced themselves, the oldest first.
    silent: Vec<Silent>,
    /// This counts, by address, the connections that stay.
    staying: HashMap<IpAddr, usize>,
}

/// A connection that has not introduced itself.
struct Silent {
    number: u64,
    address: IpAddr,
    stream: Weak<TcpStream>,
}

/// The place of one connection, which is free again when this is dropped.
pub struct ConnectionSlot {
    limiter: Rc<ConnectionLimiter>,
    address: IpAddr,
    number: u64,
    stays: bool,
}

impl ConnectionLimiter {
    /// Lets a connection in, if need be in place of one that is silent.
    pub fn enter(self: &Rc<Self>, address: IpAddr, stream: &Rc<TcpStream>) -> ConnectionSlot {
        let mut inner = self.inner.borrow_mut();
        while let Some(index) = inner.makes_way_for(address) {
            if let Some(stream) = inner.silent.remove(index).stream.upgrade() {
                // This ends the task that reads from it.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        let number = inner.next;
        inner.next += 1;
        inner.silent.push(Silent { number, address, stream: Rc::downgrade(stream) });
        ConnectionSlot { limiter: self.clone(), address, number, stays: false }
    }

    /// Logs, now and then, that a connection from an address of no peer was closed.
    pub fn turned_away(&self, address: IpAddr, what: &str) {
        if let Some(left_out) = self.told.borrow_mut().say((address, what.to_owned())) {
            warn!(
                %address,
                left_out,
                "closed a connection to {what}: the address is that of no peer; see [[peer]] in the configuration"
            );
        }
    }

    /// Logs, now and then, that a connection has ended before it was of any use.
    pub fn came_to_nothing(&self, address: IpAddr, error: &LinkError) {
        if let Some(left_out) = self.told.borrow_mut().say((address, error.to_string())) {
            info!(%address, %error, left_out, "a connection came to nothing");
        }
    }
}

impl Inner {
    /// Returns the index of the silent connection that must go for one of this address to come, if one must.
    fn makes_way_for(&self, address: IpAddr) -> Option<usize> {
        let count = |address: IpAddr| self.silent.iter().filter(|silent| silent.address == address).count();
        let crowded = match count(address) {
            SHARE.. => address,
            // The address that has taken most places gives one up.
            _ if self.silent.len() >= PLACES => {
                self.silent.iter().map(|silent| silent.address).max_by_key(|address| count(*address))?
            }
            _ => return None,
        };
        self.silent.iter().position(|silent| silent.address == crowded)
    }
}

impl ConnectionSlot {
    /// Notes that the connection has introduced itself and stays: no newer connection takes its place. Returns false if
    /// too many connections of its address stay already.
    pub fn stay(&mut self) -> bool {
        let mut inner = self.limiter.inner.borrow_mut();
        let staying = inner.staying.entry(self.address).or_default();
        if *staying >= STAYING {
            return false;
        }
        *staying += 1;
        inner.silent.retain(|silent| silent.number != self.number);
        self.stays = true;
        true
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut inner = self.limiter.inner.borrow_mut();
        if !self.stays {
            return inner.silent.retain(|silent| silent.number != self.number);
        }
        if let Some(staying) = inner.staying.get_mut(&self.address) {
            *staying -= 1;
            if *staying == 0 {
                inner.staying.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream as StdStream};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_crowd_of_one_address_makes_way_for_itself_and_for_others() {
        tokio_uring::start(async {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let connect = || {
                let there = StdStream::connect(listener.local_addr().unwrap()).unwrap();
                there.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                (Rc::new(TcpStream::from_std(listener.accept().unwrap().0)), there)
            };
            let is_closed = |mut there: &StdStream| there.read(&mut [0]).is_ok_and(|count| count == 0);
            let (limiter, first, second) =
                (Rc::<ConnectionLimiter>::default(), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
            let (quiet, quiet_there) = connect();
            let mut patient = limiter.enter(second, &quiet);
            let mut crowd = Vec::new();
            for _ in 0..SHARE + 3 {
                let (stream, there) = connect();
                crowd.push((limiter.enter(first, &stream), stream, there));
            }
            assert_eq!(limiter.inner.borrow().silent.len(), SHARE + 1);
            assert!(crowd[..3].iter().all(|(_, _, there)| is_closed(there)));
            for (_, _, there) in &crowd[3..] {
                there.set_nonblocking(true).unwrap();
                assert!(!is_closed(there));
            }
            // One that has introduced itself stays.
            assert!(patient.stay());
            quiet_there.set_nonblocking(true).unwrap();
            for _ in 0..SHARE + 1 {
                let (stream, there) = connect();
                crowd.push((limiter.enter(second, &stream), stream, there));
            }
            assert!(!is_closed(&quiet_there));
            crowd.clear();
            assert!(limiter.inner.borrow().silent.is_empty());
            // Not all of one address do.
            let mut staying = vec![patient];
            for _ in 1..STAYING {
                let mut slot = limiter.enter(second, &quiet);
                assert!(slot.stay());
                staying.push(slot);
            }
            assert!(!limiter.enter(second, &quiet).stay() && limiter.enter(first, &quiet).stay());
            staying.clear();
            assert!(limiter.inner.borrow().staying.is_empty() && limiter.enter(second, &quiet).stay());
            // All addresses together.
            let mut many = Vec::new();
            for address in 0..=(PLACES as u32) {
                many.push(limiter.enter(IpAddr::V4((address / 2).into()), &quiet));
            }
            assert_eq!(limiter.inner.borrow().silent.len(), PLACES);
        });
    }
}
