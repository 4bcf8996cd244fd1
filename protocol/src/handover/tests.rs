use super::*;

mod postcopy;

fn source(events: &[Event]) -> Source {
    let (mut source, _) = Source::new();
    for &event in events {
        drop(source.on(event));
    }
    source
}

const TO_PAUSED: [Event; 4] =
    [Event::Message(Message::Accept), Event::SwitchOver, Event::Journalled(Record::Leaving), Event::Sent];

fn committing() -> Source {
    let mut source = source(&TO_PAUSED);
    assert_eq!(source.on(Event::Message(Message::Ready)), [Action::Relinquish]);
    assert_eq!(source.on(Event::Relinquished), [Action::Journal(Record::Committed)]);
    source
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
fn a_move_that_goes_well() {
    let (mut source, actions) = Source::new();
    assert_eq!(actions, [Action::Send(Message::Offer)]);
    let mut destination = Destination::new();
    assert_eq!(destination.on(Event::Accepted), [Action::Send(Message::Accept)]);
    assert_eq!(source.on(Event::Message(Message::Accept)), [Action::Copy]);
    assert_eq!(source.phase(), Phase::Copying);
    assert_eq!(source.on(Event::SwitchOver), [Action::Journal(Record::Leaving)]);
    assert_eq!(source.phase(), Phase::SwitchingOver);
    assert_eq!(source.on(Event::Journalled(Record::Leaving)), [Action::Pause]);
    assert_eq!(source.on(Event::Sent), []);
    assert_eq!(destination.on(Event::Loading), [Action::Journal(Record::Prepared)]);
    assert_eq!(destination.on(Event::Journalled(Record::Prepared)), []);
    assert_eq!(destination.on(Event::Loaded), [Action::Send(Message::Ready)]);
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
    let mut source = source(&TO_PAUSED[..3]);
    assert_eq!(source.on(Event::Message(Message::Ready)), []);
    assert_eq!(source.on(Event::Sent), [Action::Relinquish]);
}

#[test]
fn a_ready_before_the_switchover_means_nothing() {
    let mut source = source(&TO_PAUSED[..1]);
    assert_eq!(source.on(Event::Message(Message::Ready)), []);
    assert_eq!(source.on(Event::SwitchOver), [Action::Journal(Record::Leaving)]);
    assert_eq!(source.on(Event::Journalled(Record::Leaving)), [Action::Pause]);
    assert_eq!(source.on(Event::Sent), []);
    assert_eq!(source.phase(), Phase::SwitchingOver);
}

#[test]
fn before_the_commit_every_failure_keeps_the_guest() {
    let ready = Event::Message(Message::Ready);
    let path: Vec<Event> = TO_PAUSED.into_iter().chain([ready]).collect();
    for length in 0..=path.len() {
        for (failure, outcome) in [
            (Event::PeerLost, Outcome::Failed),
            (Event::Failed, Outcome::Failed),
            (Event::Message(Message::Abort), Outcome::Failed),
            (Event::Message(Message::Declined), Outcome::Failed),
            (Event::Cancel, Outcome::Cancelled),
        ] {
            let mut source = source(&path[..length]);
            if length < path.len() {
                assert_eq!(source.on(failure), [Action::Resume, Action::Send(Message::Abort)]);
                assert_eq!(source.on(ready), [Action::Send(Message::Abort)]);
                assert_eq!(source.on(Event::Resumed), [Action::Forget, Action::Report(outcome)]);
            } else {
                // The VMM may have been relinquished: the destination must not forget before it runs.
                assert_eq!(source.on(failure), [Action::Resume]);
                assert_eq!(source.on(ready), []);
                let told = [Action::Forget, Action::Send(Message::Abort), Action::Report(outcome)];
                assert_eq!(source.on(Event::Resumed), told);
                assert_eq!(source.on(ready), [Action::Send(Message::Abort)]);
            }
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
    // Not before it is known that the VMM has not run it.
    for message in [Message::Commit, Message::Abort, Message::Withdraw] {
        assert_eq!(destination.on(Event::Message(message)), []);
    }
    assert_eq!(destination.on(Event::Waits), [Action::Send(Message::Ready)]);
    for event in [Event::PeerLost, Event::Failed, Event::Cancel, Event::Message(Message::Done)] {
        assert_eq!(destination.on(event), []);
    }
    assert_eq!(destination.on(Event::Tick), [Action::Send(Message::Ready)]);
    assert_eq!(Source::answer_unknown(Message::Ready), Some(Message::Abort));
    assert_eq!(
        destination.on(Event::Message(Message::Abort)),
        [Action::Discard, Action::Report(Outcome::Failed)]
    );
    assert_eq!(destination.on(Event::Discarded), [Action::Forget]);
}

#[test]
fn what_fails_while_the_state_is_loaded_leaves_no_record() {
    for written in [false, true] {
        for failure in [Event::Failed, Event::PeerLost, Event::VmmGone, Event::Message(Message::Abort)] {
            let mut destination = Destination::new();
            destination.on(Event::Accepted);
            destination.on(Event::Loading);
            if written {
                assert_eq!(destination.on(Event::Journalled(Record::Prepared)), []);
            }
            assert_eq!(destination.phase(), Phase::Copying);
            let done = [Action::Send(Message::Abort), Action::Discard, Action::Report(Outcome::Failed)];
            assert_eq!(destination.on(failure), done);
            assert_eq!(
                destination.on(Event::Discarded),
                [Action::Forget],
                "after what is still being written"
            );
        }
    }
}

#[test]
fn a_state_may_be_loaded_before_that_is_written_down() {
    let mut destination = Destination::new();
    destination.on(Event::Accepted);
    destination.on(Event::Loading);
    assert_eq!(destination.on(Event::Loaded), []);
    assert_eq!(destination.on(Event::Journalled(Record::Prepared)), [Action::Send(Message::Ready)]);
}

#[test]
fn a_vmm_that_had_not_loaded_everything_is_not_ready_after_a_restart() {
    let (mut destination, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(destination.on(Event::ResumeFailed), []);
    assert_eq!(destination.on(Event::Message(Message::Commit)), []);
    assert_eq!(destination.on(Event::Waits), [Action::Journal(Record::Declined)]);
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
        Event::Loading,
        Event::Loaded,
        Event::Journalled(Record::Prepared),
        Event::Message(Message::Commit),
    ];
    for length in 3..=to_starting.len() {
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
        assert_eq!(destination.on(Event::Message(Message::Done)), [], "its VMM may still be there");
        assert_eq!(destination.on(Event::VmmGone), [Action::Forget]);
    }
}

#[test]
fn what_was_prepared_and_cannot_run_is_given_back_when_its_vmm_has_not_run_it() {
    let (mut destination, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(destination.on(Event::ResumeFailed), []);
    for event in [Event::Tick, Event::Message(Message::Commit), Event::Message(Message::Withdraw)] {
        assert_eq!(destination.on(event), [], "its VMM has not been heard");
    }
    let mut ended = destination;
    assert_eq!(ended.on(Event::VmmGone), [Action::Journal(Record::Declined)]);
    assert_eq!(destination.on(Event::Waits), [Action::Journal(Record::Declined)]);
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
    assert_eq!(source.on(Event::JournalFailed(Record::Committed)), [Action::Resume]);

    let mut source = serving();
    assert_eq!(source.on(Event::Abandoned), [Action::Journal(Record::Lost)]);
    assert_eq!(source.on(Event::Tick), [], "one write at a time");
    assert_eq!(source.on(Event::JournalFailed(Record::Lost)), []);
    assert_eq!(source.on(Event::Tick), [Action::Journal(Record::Lost)]);
}

#[test]
fn records_are_read_back_and_belong_to_one_role() {
    for record in Record::ALL {
        assert_eq!(record.to_string().parse(), Ok(record));
        assert!(Source::recover(Some(record)).is_ok() != Destination::recover(Some(record)).is_ok());
    }
    assert!("commited".parse::<Record>().is_err());
    let error = Source::recover(Some(Record::Prepared)).expect_err("not a source's record");
    assert!(error.to_string().contains("prepared"), "{error}");
}

#[test]
fn a_source_that_does_not_know_whether_it_committed_asks() {
    let (mut unsure, actions) = Source::recover(Some(Record::Leaving)).expect("its record");
    assert_eq!((actions, unsure.can_resolve()), (vec![], false));
    assert_eq!(unsure.on(Event::Message(Message::Ready)), [], "its VMM has not been heard");
    let mut never_relinquished = unsure;
    assert_eq!(never_relinquished.on(Event::Owned), [Action::Resume]);
    let told = [Action::Forget, Action::Send(Message::Abort), Action::Report(Outcome::Failed)];
    assert_eq!(never_relinquished.on(Event::Resumed), told);

    let (of_a_vmm, ask) = Source::recover(None).expect("nothing is a fine record");
    assert_eq!(ask, [Action::Send(Message::Withdraw)]);
    assert_eq!(unsure.on(Event::Waits), ask);
    assert_eq!(unsure, of_a_vmm);
    for event in [Event::Tick, Event::Message(Message::Ready)] {
        assert_eq!(unsure.on(event), ask);
    }
    for message in [Message::Unknown, Message::Abort, Message::Done] {
        assert_eq!(unsure.on(Event::Message(message)), [], "{message:?} permits nothing");
    }
    let mut passed_on = unsure;
    assert_eq!(passed_on.on(Event::Message(Message::Running)), [Action::Journal(Record::Finished)]);
    let mut declined = unsure;
    assert_eq!(declined.on(Event::Message(Message::Declined)), [Action::Journal(Record::TakenBack)]);
    assert_eq!(declined.on(Event::JournalFailed(Record::TakenBack)), []);
    assert_eq!(declined.on(Event::Tick), ask);

    assert_eq!(Destination::answer_unknown(Message::Withdraw), Some(Message::Unknown));
    assert_eq!(Destination::answer_unknown(Message::Commit), Some(Message::Unknown));
    let (mut destination, actions) = Destination::recover(None).expect("nothing is a fine record");
    assert_eq!(actions, [Action::Journal(Record::Prepared)]);
    assert_eq!(destination.on(Event::Journalled(Record::Prepared)), [Action::Send(Message::Ready)]);
    assert_eq!(destination.on(Event::Message(Message::Withdraw)), [Action::Journal(Record::Declined)]);
    let declined = [Action::Send(Message::Declined), Action::Discard, Action::Report(Outcome::TakenBack)];
    assert_eq!(destination.on(Event::Journalled(Record::Declined)), declined);
}

#[test]
fn an_operator_decides_what_is_in_doubt_and_nothing_else() {
    let (run_here, discard) = (Event::Resolved(Resolution::RunHere), Event::Resolved(Resolution::Discard));
    for mut other in [source(&TO_PAUSED), committing(), serving()] {
        let before = other;
        assert!(!other.can_resolve());
        assert_eq!((other.on(run_here), other.on(discard)), (vec![], vec![]));
        assert_eq!(other, before);
    }
    for record in [None, Some(Record::Committed)] {
        let (source, _) = Source::recover(record).expect("its record");
        assert!(source.can_resolve());
        let mut kept = source;
        assert_eq!(kept.on(run_here), [Action::Journal(Record::TakenBack)]);
        assert_eq!(kept.on(Event::Journalled(Record::TakenBack))[1], Action::Resume);
        let mut given_up = source;
        assert_eq!(given_up.on(discard), [Action::Journal(Record::GivenUp)]);
        let told = [Action::Send(Message::Done), Action::Discard, Action::Report(Outcome::GivenUp)];
        assert_eq!(given_up.on(Event::Journalled(Record::GivenUp)), told);
    }
    let (mut destination, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert!(!destination.can_resolve(), "its VMM has not been heard");
    assert_eq!(destination.on(Event::Waits), [Action::Send(Message::Ready)]);
    let mut given_up = destination;
    assert_eq!(destination.on(run_here), [Action::Journal(Record::Running)]);
    assert_eq!(given_up.on(discard), [Action::Journal(Record::Declined)]);
    let told = [Action::Send(Message::Declined), Action::Discard, Action::Report(Outcome::GivenUp)];
    assert_eq!(given_up.on(Event::Journalled(Record::Declined)), told);
}

#[test]
fn what_was_decided_is_reported_after_a_restart() {
    for (record, outcome) in [
        (Record::Finished, Outcome::Completed),
        (Record::Lost, Outcome::Lost),
        (Record::GivenUp, Outcome::GivenUp),
    ] {
        let (_, actions) = Source::recover(Some(record)).expect("its record");
        assert_eq!(actions, [Action::Discard, Action::Report(outcome)]);
    }
}

#[test]
fn a_vmm_that_runs_is_believed_where_the_journal_lags_behind() {
    let (mut destination, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(destination.on(Event::Owned), [Action::Journal(Record::Running)]);
    assert_eq!(destination.on(Event::JournalFailed(Record::Running)), []);
    assert_eq!(destination.on(Event::Message(Message::Abort)), [], "it runs, whatever the journal says");
    assert_eq!(destination.on(Event::Tick), [Action::Journal(Record::Running)]);
    let lost = |outcome| [Action::Send(Message::Lost), Action::Report(outcome)];
    let mut ended = destination;
    assert_eq!(ended.on(Event::VmmGone), lost(Outcome::VmmGone));
    assert_eq!(destination.on(Event::Journalled(Record::Running)), [Action::Resume]);
    let (mut incomplete, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(incomplete.on(Event::ResumeFailed), []);
    assert_eq!(incomplete.on(Event::Owned), [Action::Journal(Record::Running)]);
    assert_eq!(incomplete.on(Event::Journalled(Record::Running)), [Action::Resume]);
    assert_eq!(incomplete.on(Event::Abandoned), lost(Outcome::Lost));

    let (mut source, _) = Source::recover(Some(Record::Committed)).expect("its record");
    assert_eq!(source.on(Event::Owned), [Action::Resume]);
}

#[test]
fn a_guest_that_shuts_itself_down_is_not_lost() {
    for mut source in [source(&TO_PAUSED), Source::recover(None).expect("nothing is a fine record").0] {
        let told = [Action::Forget, Action::Send(Message::Abort), Action::Report(Outcome::PoweredOff)];
        assert_eq!(source.on(Event::PoweredOff), told);
        assert!(source.is_over());
    }
    let (resuming, _) = Destination::recover(Some(Record::Running)).expect("its record");
    for mut destination in [resuming, fetching()] {
        let told = [Action::Send(Message::Running), Action::Report(Outcome::PoweredOff)];
        assert_eq!(destination.on(Event::PoweredOff), told);
        assert_eq!(destination.on(Event::Message(Message::Commit)), told[..1]);
        assert_eq!(destination.on(Event::Message(Message::Done)), [Action::Forget]);
    }
    // What has never run here cannot have shut itself down here.
    let (mut unsure, _) = Destination::recover(Some(Record::Prepared)).expect("its record");
    assert_eq!(unsure.on(Event::PoweredOff), [Action::Journal(Record::Declined)]);
}
