use super::*;

fn source(events: &[Event]) -> Source {
    let (mut source, _) = Source::new();
    for &event in events {
        drop(source.on(event));
    }
    source
}

const TO_PAUSED: [Event; 3] = [Event::Message(Message::Accept), Event::SwitchOver, Event::Sent];

fn committing() -> Source {
    let mut source = source(&TO_PAUSED);
    assert_eq!(source.on(Event::Message(Message::Ready)), [Action::Relinquish]);
    assert_eq!(source.on(Event::Relinquished), [Action::Journal(Record::Committed)]);
    source
}

#[test]
fn a_move_that_goes_well() {
    let (mut source, actions) = Source::new();
    assert_eq!(actions, [Action::Send(Message::Offer)]);
    let mut destination = Destination::new();
    assert_eq!(destination.on(Event::Accepted), [Action::Send(Message::Accept)]);
    assert_eq!(source.on(Event::Message(Message::Accept)), [Action::Copy]);
    assert_eq!(source.phase(), Phase::Copying);
    assert_eq!(source.on(Event::SwitchOver), [Action::Pause]);
    assert_eq!(source.phase(), Phase::SwitchingOver);
    assert_eq!(source.on(Event::Sent), []);
    assert_eq!(destination.on(Event::Loaded), [Action::Journal(Record::Prepared)]);
    assert_eq!(destination.on(Event::Journalled(Record::Prepared)), [Action::Send(Message::Ready)]);
    assert_eq!(source.on(Event::Message(Message::Ready)), [Action::Relinquish]);
    assert!(source.can_cancel());
    assert_eq!(source.on(Event::Relinquished), [Action::Journal(Record::Committed)]);
    assert!(!source.can_cancel());
    assert_eq!(source.on(Event::Cancel), []);
    assert_eq!(source.on(Event::Journalled(Record::Committed)), [Action::Send(Message::Commit)]);
    assert_eq!(destination.on(Event::Message(Message::Commit)), [Action::Journal(Record::Running)]);
    assert_eq!(destination.on(Event::Journalled(Record::Running)), [Action::Resume]);
    assert_eq!(
        destination.on(Event::Resumed),
        [Action::Send(Message::Running), Action::Report(Outcome::Completed)]
    );
    assert_eq!(source.on(Event::Message(Message::Running)), [Action::Journal(Record::Finished)]);
    assert_eq!(
        source.on(Event::Journalled(Record::Finished)),
        [Action::Send(Message::Done), Action::Discard, Action::Report(Outcome::Completed)]
    );
    assert_eq!(destination.on(Event::Message(Message::Done)), [Action::Forget]);
    assert_eq!(source.on(Event::Discarded), [Action::Forget]);
    assert!(source.is_over() && destination.is_over());
    assert_eq!((source.phase(), destination.phase()), (Phase::Completed, Phase::Completed));
}

#[test]
fn a_ready_that_comes_before_the_books_are_closed_is_remembered() {
    let mut source = source(&TO_PAUSED[..2]);
    assert_eq!(source.on(Event::Message(Message::Ready)), []);
    assert_eq!(source.on(Event::Sent), [Action::Relinquish]);
}

#[test]
fn a_ready_before_the_switchover_means_nothing() {
    let mut source = source(&TO_PAUSED[..1]);
    assert_eq!(source.on(Event::Message(Message::Ready)), []);
    assert_eq!(source.on(Event::SwitchOver), [Action::Pause]);
    assert_eq!(source.on(Event::Sent), []);
    assert_eq!(source.phase(), Phase::SwitchingOver);
}

#[test]
fn before_the_commit_every_failure_keeps_the_guest() {
    let ready = Event::Message(Message::Ready);
    let path = [TO_PAUSED[0], TO_PAUSED[1], TO_PAUSED[2], ready];
    for length in 0..=path.len() {
        for (failure, outcome) in [
            (Event::PeerLost, Outcome::Failed),
            (Event::Failed, Outcome::Failed),
            (Event::Message(Message::Abort), Outcome::Failed),
            (Event::Message(Message::Declined), Outcome::Failed),
            (Event::Cancel, Outcome::Cancelled),
        ] {
            let mut source = source(&path[..length]);
            assert_eq!(source.on(failure), [Action::Resume, Action::Send(Message::Abort)]);
            assert_eq!(source.on(ready), [Action::Send(Message::Abort)]);
            assert_eq!(source.on(Event::Resumed), [Action::Forget, Action::Report(outcome)]);
            assert!(source.is_over());
            assert_eq!(source.phase(), Phase::Returned);
        }
    }
}

#[test]
fn while_and_after_the_commit_is_written_nothing_but_the_destination_takes_it_back() {
    for written in [false, true] {
        let mut source = committing();
        if written {
            drop(source.on(Event::Journalled(Record::Committed)));
        }
        let before = source;
        for event in [
            Event::PeerLost,
            Event::Failed,
            Event::VmmGone,
            Event::Cancel,
            Event::SwitchOver,
            Event::Message(Message::Abort),
            Event::Message(Message::Refuse),
        ] {
            assert_eq!(source.on(event), []);
            assert_eq!(source, before);
        }
    }
}

#[test]
fn a_declined_guest_is_taken_back_durably_first() {
    let mut source = committing();
    drop(source.on(Event::Journalled(Record::Committed)));
    assert_eq!(source.on(Event::Message(Message::Declined)), [Action::Journal(Record::TakenBack)]);
    assert_eq!(
        source.on(Event::Journalled(Record::TakenBack)),
        [Action::Send(Message::Done), Action::Resume]
    );
    assert_eq!(source.on(Event::ResumeFailed), []);
    assert_eq!(source.on(Event::Tick), [Action::Resume]);
    assert_eq!(source.on(Event::Resumed), [Action::Forget, Action::Report(Outcome::TakenBack)]);
}

#[test]
fn a_destination_in_doubt_waits_and_asks() {
    let (mut destination, actions) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(actions, [Action::Send(Message::Ready)]);
    for event in [Event::PeerLost, Event::Failed, Event::Cancel, Event::Message(Message::Done)] {
        assert_eq!(destination.on(event), []);
    }
    assert_eq!(destination.on(Event::Tick), [Action::Send(Message::Ready)]);
    assert_eq!(Source::answer_unknown(Message::Ready), Some(Message::Abort));
    assert_eq!(
        destination.on(Event::Message(Message::Abort)),
        [Action::Discard, Action::Forget, Action::Report(Outcome::Failed)]
    );
}

#[test]
fn a_vmm_that_vanishes_while_starting_may_have_run() {
    let (mut destination, _) = Destination::recover(Some(Record::Running)).expect("its record");
    assert_eq!(
        destination.on(Event::VmmGone),
        [Action::Send(Message::Lost), Action::Report(Outcome::VmmGone)]
    );
    assert_eq!(destination.on(Event::Tick), [Action::Send(Message::Lost)]);
    assert_eq!(destination.on(Event::Message(Message::Done)), [Action::Forget]);
}

#[test]
fn a_vmm_that_ends_before_it_was_told_to_run_never_ran() {
    let to_starting = [
        Event::Accepted,
        Event::Loaded,
        Event::Journalled(Record::Prepared),
        Event::Message(Message::Commit),
    ];
    for length in 2..=to_starting.len() {
        let mut destination = Destination::new();
        for &event in &to_starting[..length] {
            drop(destination.on(event));
        }
        assert_eq!(destination.on(Event::VmmGone), [Action::Journal(Record::Declined)]);
        // What was still on its way to the journal changes nothing.
        assert_eq!(destination.on(Event::Journalled(Record::Prepared)), []);
        assert_eq!(destination.on(Event::Journalled(Record::Running)), []);
        assert_eq!(
            destination.on(Event::Journalled(Record::Declined)),
            [Action::Send(Message::Declined), Action::Discard, Action::Report(Outcome::TakenBack)]
        );
        assert_eq!(destination.on(Event::Message(Message::Done)), [Action::Forget]);
    }
}

#[test]
fn what_was_prepared_and_cannot_run_is_given_back_at_once() {
    let (mut destination, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(destination.on(Event::ResumeFailed), [Action::Journal(Record::Declined)]);
    // The commit does not wait for the VMM to be seen to end, nor does the answer.
    assert_eq!(destination.on(Event::Message(Message::Commit)), []);
    assert_eq!(
        destination.on(Event::Journalled(Record::Declined)),
        [Action::Send(Message::Declined), Action::Discard, Action::Report(Outcome::TakenBack)]
    );
    assert_eq!(destination.on(Event::VmmGone), []);
    assert_eq!(destination.on(Event::Message(Message::Commit)), [Action::Send(Message::Declined)]);
    assert_eq!(destination.on(Event::Message(Message::Done)), [Action::Forget]);
}

#[test]
fn a_journal_that_refuses_is_tried_again() {
    let (mut destination, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(destination.on(Event::VmmGone), [Action::Journal(Record::Declined)]);
    assert_eq!(destination.on(Event::Tick), [], "one write at a time");
    assert_eq!(destination.on(Event::JournalFailed(Record::Declined)), []);
    assert_eq!(destination.on(Event::Tick), [Action::Journal(Record::Declined)]);

    let mut source = committing();
    assert_eq!(
        source.on(Event::JournalFailed(Record::Committed)),
        [Action::Resume, Action::Send(Message::Abort)]
    );

    let mut source = serving();
    assert_eq!(source.on(Event::Abandoned), [Action::Journal(Record::Finished)]);
    assert_eq!(source.on(Event::Tick), [], "one write at a time");
    assert_eq!(source.on(Event::JournalFailed(Record::Finished)), []);
    assert_eq!(source.on(Event::Tick), [Action::Journal(Record::Finished)]);
}

/// A source that has heard that the guest runs, and needs memory from here.
fn serving() -> Source {
    let (mut source, actions) = Source::recover(Some(Record::Committed)).expect("its record");
    assert_eq!(actions, [Action::Send(Message::Commit)]);
    assert_eq!(source.on(Event::Message(Message::Fetching)), [Action::Serve]);
    assert_eq!((source.phase(), source.can_abandon()), (Phase::Fetching, true));
    source
}

/// A destination whose guest runs, and lacks part of its memory.
fn fetching() -> Destination {
    let (mut destination, actions) = Destination::recover(Some(Record::Running)).expect("its record");
    assert_eq!(actions, [Action::Resume]);
    assert_eq!(destination.on(Event::ResumedIncomplete), [Action::Send(Message::Fetching)]);
    assert_eq!((destination.phase(), destination.can_abandon()), (Phase::Fetching, true));
    destination
}

#[test]
fn the_memory_stays_until_the_last_page_is_there() {
    let (mut source, mut destination) = (serving(), fetching());
    for event in [
        Event::Tick,
        Event::PeerLost,
        Event::Failed,
        Event::VmmGone,
        Event::Cancel,
        Event::Message(Message::Ready),
        Event::Message(Message::Fetching),
        Event::Message(Message::Declined),
        Event::Message(Message::Abort),
    ] {
        assert_eq!(source.on(event), [], "{event:?}");
    }
    for event in [Event::PeerLost, Event::Failed, Event::Message(Message::Done)] {
        assert_eq!(destination.on(event), [], "{event:?}");
    }
    for event in [Event::Tick, Event::Message(Message::Commit)] {
        assert_eq!(destination.on(event), [Action::Send(Message::Fetching)]);
    }
    assert_eq!(
        destination.on(Event::Complete),
        [Action::Send(Message::Running), Action::Report(Outcome::Completed)]
    );
    assert_eq!(source.on(Event::Message(Message::Running)), [Action::Journal(Record::Finished)]);
    assert_eq!(source.on(Event::Message(Message::Fetching)), [], "not before it is durable");
    assert_eq!(
        source.on(Event::Journalled(Record::Finished)),
        [Action::Send(Message::Done), Action::Discard, Action::Report(Outcome::Completed)]
    );
}

#[test]
fn what_is_lost_is_reported_as_lost_by_both() {
    let lost = [Action::Send(Message::Lost), Action::Report(Outcome::Lost)];
    for event in [Event::VmmGone, Event::Abandoned, Event::Message(Message::Gone)] {
        let mut destination = fetching();
        assert_eq!(destination.on(event), lost);
        assert_eq!(destination.on(Event::Complete), [], "too late");
        assert_eq!(destination.on(Event::Message(Message::Commit)), lost[..1]);
        assert_eq!(destination.on(Event::Message(Message::Done)), [Action::Forget]);
    }
    let (mut unsure, _) = Destination::recover(Some(Record::Running)).expect("its record");
    assert_eq!(unsure.on(Event::Abandoned), lost);

    let (restarted, _) = Source::recover(Some(Record::Committed)).expect("its record");
    for (mut source, event) in [
        (restarted, Event::Message(Message::Lost)),
        (serving(), Event::Message(Message::Lost)),
        (serving(), Event::Abandoned),
    ] {
        assert_eq!(source.on(event), [Action::Journal(Record::Finished)]);
        assert_eq!(
            source.on(Event::Journalled(Record::Finished)),
            [Action::Send(Message::Done), Action::Discard, Action::Report(Outcome::Lost)]
        );
        assert_eq!(source.on(Event::Message(Message::Fetching)), [Action::Send(Message::Gone)]);
        assert_eq!(source.on(Event::Message(Message::Lost)), [Action::Send(Message::Done)]);
    }
}

#[test]
fn records_are_read_back_and_belong_to_one_half() {
    for record in Record::ALL {
        assert_eq!(record.to_string().parse(), Ok(record));
        assert!(Source::recover(Some(record)).is_ok() != Destination::recover(Some(record)).is_ok());
    }
    assert!("commited".parse::<Record>().is_err());
    let error = Source::recover(Some(Record::Prepared)).expect_err("not a source's record");
    assert!(error.to_string().contains("prepared"), "{error}");
}
