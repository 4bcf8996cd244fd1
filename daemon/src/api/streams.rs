//! Limits the streams of events. They are fewer than connections, so that they leave room for orders.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use memlane_api::types::{ApiError, ErrorCode};

use super::line::{Busy, MAX_CONNECTIONS};
use super::shares::{Holder, Share};

/// At most this many streams may be open.
pub(super) const MAX_STREAMS: usize = MAX_CONNECTIONS * 3 / 4;

/// The number of open streams of each user in each role.
#[derive(Default)]
pub(super) struct Streams {
    open: RefCell<HashMap<Holder, usize>>,
}

/// One open stream. It counts until it is dropped.
pub(super) struct Stream {
    streams: Rc<Streams>,
    holder: Holder,
    _busy: Busy,
}

impl Streams {
    /// Opens another stream over a connection, which is busy until the stream is dropped.
    ///
    /// # Errors
    ///
    /// Fails if too many streams are open.
    pub(super) fn open(self: &Rc<Self>, holder: Holder, busy: Busy) -> Result<Stream, ApiError> {
        let mut open = self.open.borrow_mut();
        let refused = |count: usize, whose: &str| {
            let text = format!(
                "{count} streams of events are open{whose}, which is all that there may be. Close other streams, or \
                 poll GET /v1/migrations/{{id}}"
            );
            Err(ApiError::new(ErrorCode::Unavailable, text))
        };
        let all = open.values().sum::<usize>();
        if all >= MAX_STREAMS {
            return refused(all, "");
        }
        for share in Share::of(holder) {
            let held = open.iter().filter(|(other, _)| share.counts(**other)).map(|(_, count)| count).sum();
            if held >= share.most(MAX_STREAMS) {
                return refused(held, &format!(" by {}", share.holders()));
            }
        }
        *open.entry(holder).or_default() += 1;
        Ok(Stream { streams: self.clone(), holder, _busy: busy })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut open = self.streams.open.borrow_mut();
        if let Some(count) = open.get_mut(&self.holder) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.holder);
            }
        }
    }
}
