//! Streams of events: fewer than connections, so that they leave room for orders.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use memlane_api::types::{ApiError, ErrorCode};

use super::Caller;
use super::line::{Busy, MAX_CONNECTIONS};

/// Most streams at once.
pub const MAX_STREAMS: usize = MAX_CONNECTIONS * 3 / 4;
/// Most streams of one user at once.
pub const MAX_STREAMS_OF_USER: usize = MAX_STREAMS / 2;

/// The streams that are open, by their user.
#[derive(Default)]
pub struct Streams {
    open: RefCell<HashMap<Option<u32>, usize>>,
}

/// One stream, until it is dropped.
pub struct Stream {
    streams: Rc<Streams>,
    user: Option<u32>,
    _busy: Busy,
}

impl Streams {
    /// Opens one more, over a connection that is busy for as long.
    pub fn open(self: &Rc<Self>, caller: &Caller, busy: Busy) -> Result<Stream, ApiError> {
        let (mut open, user) = (self.open.borrow_mut(), caller.uid);
        let (all, of_user) = (open.values().sum::<usize>(), open.get(&user).copied().unwrap_or(0));
        if all >= MAX_STREAMS || of_user >= MAX_STREAMS_OF_USER {
            let text = format!(
                "{all} streams of events are open, {of_user} of them by this user; there may be {MAX_STREAMS} and \
                 {MAX_STREAMS_OF_USER}: end others, or ask for the migration itself now and then"
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
