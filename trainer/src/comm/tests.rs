//! The same tests over every transport that runs without other processes: threads, and sockets between threads.

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::rendezvous::Token;
use super::*;
use crate::data::share::Share;

/// Every rank does `work`; what each returned, in the order of the ranks.
fn together<R: Send>(worlds: Vec<World>, work: impl Fn(&World) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(move || work(&world))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn place(rank: usize, size: usize, port: u16) -> Place {
    Place {
        rank,
        size,
        local_rank: rank,
        local_size: size,
        master: Some(("localhost".to_owned(), port)),
        hosted: true,
        secret: Some("of the tests".to_owned()),
        timeout: Duration::from_secs(60),
        ..Place::default()
    }
}

fn sockets(size: usize) -> Vec<World> {
    let address = rendezvous::host(("127.0.0.1", 0), size, Token::new("of the tests")).unwrap();
    let connect = |rank: usize| {
        let mesh = tcp::connect(&place(rank, size, address.port())).unwrap();
        World { rank, size, transport: Some(Arc::new(mesh)) }
    };
    let connect = &connect;
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..size).map(|rank| scope.spawn(move || connect(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn worlds() -> impl Iterator<Item = Vec<World>> {
    [1, 2, 3, 5].into_iter().flat_map(|size| [World::threads(size), sockets(size)])
}

fn number(seed: usize) -> f32 {
    ((seed * 7919 % 1009) as f32 - 500.0) / 64.0
}

#[test]
fn what_was_dealt_comes_back_in_order_whatever_each_rank_holds() {
    for worlds in worlds() {
        for count in [0, 1, 2, 17] {
            let weights: Vec<usize> = (0..count).map(|i| i * i % 13).collect();
            let share = Share::deal(&weights, worlds.len());
            let rows = |pieces: &[usize]| -> Vec<f32> {
                pieces.iter().flat_map(|&piece| [number(piece), piece as f32]).collect()
            };
            let all: Vec<usize> = (0..count).collect();
            let gathered = together(worlds.clone(), |world| {
                let local = share.of(world.rank());
                let local = Tensor::from_vec(rows(local), (local.len(), 2), &Device::Cpu).unwrap();
                let gathered = world.gather(local, &share).unwrap();
                assert_eq!(gathered.dims(), [count, 2]);
                values(&gathered).unwrap()
            });
            assert!(gathered.iter().all(|gathered| *gathered == rows(&all)));

            let sequence =
                |&piece: &usize| Sequence { ids: vec![piece as u32; piece % 4], skip: piece as u32 };
            let sequences = together(worlds.clone(), |world| {
                world.sequences(share.of(world.rank()).iter().map(sequence).collect(), &share).unwrap()
            });
            assert!(sequences.iter().all(|found| *found == all.iter().map(sequence).collect::<Vec<_>>()));
        }
    }
}

#[test]
fn sums_run_in_the_order_of_the_ranks_and_all_get_the_same_bits() {
    for worlds in worlds() {
        let size = worlds.len();
        let expected = |i: usize| (1..size).fold(number(i), |sum, rank| sum + number(i + 31 * rank));
        for count in [0, 1, 3, 1000] {
            let share = Share::deal(&vec![1; count], size);
            let local = |world: &World| {
                let rows = (0..count).map(|i| number(i + 31 * world.rank())).collect();
                Tensor::from_vec(rows, (count, 1), &Device::Cpu).unwrap()
            };
            let scattered = together(worlds.clone(), |world| {
                let rows = world.scatter(local(world), &share).unwrap();
                let pieces = share.of(world.rank());
                assert_eq!(rows.dims(), [pieces.len(), 1]);
                values(&rows).unwrap() == pieces.iter().map(|&i| expected(i)).collect::<Vec<_>>()
            });
            assert!(scattered.into_iter().all(|same| same));
            let summed = together(worlds.clone(), |world| {
                let gradients = Gradients::of_values(local(world).flatten_all().unwrap());
                world.sum(&gradients).unwrap();
                values(gradients.flat()).unwrap()
            });
            let expected: Vec<f32> = (0..count).map(expected).collect();
            assert!(summed.iter().all(|summed| *summed == expected));
        }
    }
}

#[test]
fn all_stop_when_one_is_asked_to() {
    for worlds in worlds() {
        let last = worlds.len() - 1;
        let asked = |world: &World| world.agree((world.rank() == last).then_some(15)).unwrap();
        assert!(together(worlds.clone(), asked).into_iter().all(|signal| signal == Some(15)));
        assert!(together(worlds, |world| world.agree(None).unwrap()).into_iter().all(|none| none.is_none()));
    }
}

#[test]
fn rows_are_parts_of_all_in_the_order_of_the_ranks() {
    for worlds in worlds() {
        for count in [0, 1, 4, 11] {
            let collected = together(worlds.clone(), |world| {
                let rows: Vec<f32> = world.rows(count).map(|row| row as f32).collect();
                world.collect(Tensor::new(rows, &Device::Cpu).unwrap()).unwrap().to_vec1::<f32>().unwrap()
            });
            assert!(
                collected.iter().all(|rows| *rows == (0..count).map(|row| row as f32).collect::<Vec<_>>())
            );
        }
    }
}

#[test]
fn the_first_ranks_values_are_everybodys() {
    for worlds in worlds() {
        let found = together(worlds, |world| {
            let buffer = Tensor::full(world.rank() as f32, 5, &Device::Cpu).unwrap();
            world.spread(&buffer).unwrap();
            world.barrier().unwrap();
            (values(&buffer).unwrap(), world.of_first(vec![world.rank() as u8; 1 + world.rank()]).unwrap())
        });
        assert!(found.iter().all(|found| *found == (vec![0.0; 5], vec![0])));
    }
}

#[test]
fn a_rank_with_other_bits_is_named() {
    for worlds in worlds().filter(|worlds| worlds.len() > 2) {
        let found = together(worlds, |world| {
            world.same("model", 7).unwrap();
            world.same("model", u64::from(world.rank() == 2)).unwrap_err().to_string()
        });
        assert!(found.iter().all(|message| message == "rank 2: has another model than rank 0"), "{found:?}");
    }
}

#[test]
fn ranks_that_do_different_things_notice() {
    for worlds in worlds().filter(|worlds| worlds.len() > 1) {
        let found = together(worlds, |world| match world.rank() {
            1 => world.all(&[1u8]).map(drop),
            _ => world.all(&[1u64]).map(drop),
        });
        assert!(
            found[0].as_ref().unwrap_err().to_string().contains("rank 1: does something else than rank 0")
        );
    }
}

#[test]
fn the_others_learn_why_a_rank_has_ended() {
    for worlds in worlds().filter(|worlds| worlds.len() > 1) {
        let found = together(worlds, |world| {
            if world.rank() == 1 {
                world.abandon(&Error::Usage("no memory".to_owned()), 7);
                return None;
            }
            let error = world.barrier().unwrap_err();
            // Who hears it from another still names the first.
            world.abandon(&error, 1);
            Some(error)
        });
        for error in found.into_iter().flatten() {
            assert!(matches!(error, Error::Rank { rank: 1, status: 7, .. }), "{error:?}");
            assert_eq!(error.to_string(), "rank 1: no memory");
        }
    }
}

#[test]
fn a_rank_that_is_gone_is_named() {
    for worlds in worlds().filter(|worlds| worlds.len() > 1) {
        // The first rank's lines are closed once its thread has ended.
        let found = together(worlds, |world| if world.first() { None } else { world.barrier().err() });
        for error in found.into_iter().flatten() {
            let message = error.to_string();
            assert!(message.contains("has ended without a word"), "{message}");
        }
    }
}

#[test]
fn a_rank_that_hangs_is_named_once_patience_is_over() {
    let address = rendezvous::host(("127.0.0.1", 0), 2, Token::new("of the tests")).unwrap();
    let quick = |rank| Place { timeout: Duration::from_secs(2), ..place(rank, 2, address.port()) };
    let connect = |rank| tcp::connect(&quick(rank)).unwrap();
    let (mut first, _second) = thread::scope(|scope| {
        let other = scope.spawn(|| connect(1));
        (connect(0), other.join().unwrap())
    });
    heartbeat::beat();
    // The other rank says that it lives, but does nothing: the beats of this process stand still, or nearly.
    first.patience = Duration::from_millis(300);
    let world = World { rank: 0, size: 2, transport: Some(Arc::new(first)) };
    let message = world.barrier().unwrap_err().to_string();
    assert!(message.starts_with("rank 1: on 127.0.0.1 shows no sign of work"), "{message}");
}

/// Rank 0 of as many, connected to sockets of which nobody reads.
fn deaf(others: usize, patience: Duration) -> (World, Vec<TcpStream>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (mut sockets, mut ends) = (vec![None], Vec::new());
    for _ in 0..others {
        ends.push(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        sockets.push(Some(listener.accept().unwrap().0));
    }
    let mesh = tcp::mesh(0, sockets, patience).unwrap();
    (World { rank: 0, size: others + 1, transport: Some(Arc::new(mesh)) }, ends)
}

/// More than the system keeps for a socket.
const LONG: usize = 64 << 20;

#[test]
fn who_sends_to_a_host_that_is_gone_notices_after_the_timeout() {
    let (world, _ends) = deaf(1, Duration::from_secs(1));
    let start = Instant::now();
    let message = world.all(&vec![0u8; LONG]).unwrap_err().to_string();
    assert!(message.starts_with("rank 1: on 127.0.0.1 shows no sign of work for 1 s"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // What is half sent stays so: a word in its midst would be taken for a part of it.
    let start = Instant::now();
    world.abandon(&Error::Usage("no memory".to_owned()), 1);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn who_sends_hears_another_rank_fail() {
    let (world, mut ends) = deaf(2, Duration::from_secs(600));
    let word = [&2u32.to_le_bytes()[..], &[7], b"no memory"].concat();
    let frame = [&1u64.to_le_bytes()[..], &(word.len() as u64).to_le_bytes(), &word].concat();
    std::io::Write::write_all(&mut ends[1], &frame).unwrap();
    let error = world.all(&vec![0u8; LONG]).unwrap_err();
    assert!(matches!(error, Error::Rank { rank: 2, status: 7, .. }), "{error:?}");
}

#[test]
fn ranks_of_one_host_meet_where_nobody_outside_can_come() {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let place = |rank| Place { hosted: false, secret: None, ..place(rank, 2, port) };
    let connect = |rank| tcp::connect(&place(rank)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| connect(1));
        connect(0);
    });
    let free = |address| TcpListener::bind((address, port)).is_ok();
    assert!(free("127.0.0.2") && !free("127.0.0.1"));
}

#[test]
fn whoever_does_not_hold_the_token_is_turned_away_and_disturbs_nobody() {
    let address = rendezvous::host(("127.0.0.1", 0), 2, Token::new("of the tests")).unwrap();
    let stranger = Place { secret: Some("guessed".to_owned()), ..place(1, 2, address.port()) };
    let message = tcp::connect(&stranger).unwrap_err().to_string();
    assert!(message.contains("LODESTONE_TOKEN differs"), "{message}");
    // One who says nothing, and one who talks nonsense.
    let _silent = TcpStream::connect(address).unwrap();
    std::io::Write::write_all(&mut TcpStream::connect(address).unwrap(), &[7; 200]).unwrap();
    let wrong = Place { size: 3, local_size: 3, ..place(2, 3, address.port()) };
    let message = tcp::connect(&wrong).unwrap_err().to_string();
    assert!(message.contains("this is rank 2 of 3, but 2 are expected"), "{message}");
    // A rank that came and went away, before all were there.
    let early = Place { timeout: Duration::from_secs(1), ..place(0, 2, address.port()) };
    let message = tcp::connect(&early).unwrap_err().to_string();
    assert!(message.contains("rank 1 did not come within 1 s") || message.contains("no answer"), "{message}");

    let connect = |rank| World {
        rank,
        size: 2,
        transport: Some(Arc::new(tcp::connect(&place(rank, 2, address.port())).unwrap())),
    };
    let worlds = thread::scope(|scope| {
        let other = scope.spawn(|| connect(1));
        vec![connect(0), other.join().unwrap()]
    });
    together(worlds, |world| world.barrier().unwrap());
}

#[test]
fn a_rendezvous_that_nobody_hosts_is_said() {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let place = Place { timeout: Duration::from_millis(200), ..place(1, 2, port) };
    let message = tcp::connect(&place).unwrap_err().to_string();
    assert!(message.contains(&format!("cannot reach 127.0.0.1:{port}")), "{message}");
}
