//! Limits the streams of events. They are fewer than connections, so that they leave room for orders.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use memlane_api::types::{ApiError, ErrorCode};

use super::Caller;
use super::line::{Busy, MAX_CONNECTIONS};

/// At most this many streams may be open.
pub(super) const MAX_STREAMS: usize = MAX_CONNECTIONS * 3 / 4;
/// At most this many streams of one user may be open.
pub(super) const MAX_STREAMS_OF_USER: usize = MAX_STREAMS / 2;

/// The number of open streams of each user.
#[derive(Default)]
pub(super) struct Streams {
    open: RefCell<HashMap<Option<u32>, usize>>,
}

/// One open stream. It counts until it is dropped.
pub(super) struct Stream {
    streams: Rc<Streams>,
    user: Option<u32>,
    _busy: Busy,
}

impl Streams {
    /// Opens another stream over a connection, which is busy until the stream is dropped.
    ///
    /// # Errors
    ///
    /// Fails if too many streams are open.
    pub(super) fn open(self: &Rc<Self>, caller: &Caller, busy: Busy) -> Result<Stream, ApiError> {
        let (mut open, user) = (self.open.borrow_mut(), caller.uid);
        let (all, of_user) = (open.values().sum::<usize>(), open.get(&user).copied().unwrap_or(0));
        if all >= MAX_STREAMS || of_user >= MAX_STREAMS_OF_USER {
            let text = format!(
                "{all} streams of events are open, {of_user} of them by this user; at most {MAX_STREAMS}, and \
                 {MAX_STREAMS_OF_USER} of one user, are allowed. Close other streams, or poll GET /v1/migrations/{{id}}"
            );
            return Err(ApiError::new(ErrorCode::Unavailable, text));
        }
        *open.entry(user).or_default() += 1;
        Ok(Stream { streams: self.clone(), user, _busy: busy })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut open = self.streams.open.borrow_mut();
        if let Some(count) = open.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.user);
            }
        }
    }
}
