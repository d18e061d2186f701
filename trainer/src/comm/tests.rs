//! Tests of the collectives over threads and over sockets between threads.

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::data::partition::Partition;

/// Runs `work` on every rank; returns the results in the order of the ranks.
fn together<R: Send>(worlds: Vec<World>, work: impl Fn(&World) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(move || work(&world))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn env(rank: usize, size: usize, port: u16) -> RankEnv {
    RankEnv {
        rank,
        size,
        local_rank: rank,
        local_size: size,
        master: Some(("localhost".to_owned(), port)),
        hosted: true,
        secret: Some("of the tests".to_owned()),
        timeout: Duration::from_secs(60),
        ..RankEnv::default()
    }
}

fn sockets(size: usize) -> Vec<World> {
    let address = rendezvous::host(("127.0.0.1", 0), size, Token::new("of the tests")).unwrap();
    let connect = |rank: usize| {
        let mesh = tcp::connect(&env(rank, size, address.port())).unwrap();
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
fn gathered_rows_and_sequences_are_in_the_order_of_the_batch() {
    for worlds in worlds() {
        for count in [0, 1, 2, 17] {
            let weights: Vec<usize> = (0..count).map(|i| i * i % 13).collect();
            let share = Partition::balance(&weights, worlds.len());
            let rows = |pieces: &[usize]| -> Vec<f32> {
                pieces.iter().flat_map(|&piece| [number(piece), piece as f32]).collect()
            };
            let all: Vec<usize> = (0..count).collect();
            let gathered = together(worlds.clone(), |world| {
                let local = share.of(world.rank());
                let local = Tensor::from_vec(rows(local), (local.len(), 2), &Device::Cpu).unwrap();
                let gathered = world.all_gather_rows(local, &share).unwrap();
                assert_eq!(gathered.dims(), [count, 2]);
                values(&gathered).unwrap()
            });
            assert!(gathered.iter().all(|gathered| *gathered == rows(&all)));

            let sequence =
                |&piece: &usize| Sequence { ids: vec![piece as u32; piece % 4], skip: piece as u32 };
            let sequences = together(worlds.clone(), |world| {
                world
                    .all_gather_sequences(share.of(world.rank()).iter().map(sequence).collect(), &share)
                    .unwrap()
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
            let share = Partition::balance(&vec![1; count], size);
            let local = |world: &World| {
                let rows = (0..count).map(|i| number(i + 31 * world.rank())).collect();
                Tensor::from_vec(rows, (count, 1), &Device::Cpu).unwrap()
            };
            let scattered = together(worlds.clone(), |world| {
                let rows = world.reduce_scatter_rows(local(world), &share).unwrap();
                let pieces = share.of(world.rank());
                assert_eq!(rows.dims(), [pieces.len(), 1]);
                values(&rows).unwrap() == pieces.iter().map(|&i| expected(i)).collect::<Vec<_>>()
            });
            assert!(scattered.into_iter().all(|same| same));
            let summed = together(worlds.clone(), |world| {
                let gradients = Gradients::from_values(local(world).flatten_all().unwrap());
                world.all_reduce(&gradients).unwrap();
                values(gradients.flat()).unwrap()
            });
            let expected: Vec<f32> = (0..count).map(expected).collect();
            assert!(summed.iter().all(|summed| *summed == expected));
        }
    }
}

#[test]
fn all_ranks_stop_when_one_gets_a_signal() {
    for worlds in worlds() {
        let last = worlds.len() - 1;
        let asked = |world: &World| world.any_signal((world.rank() == last).then_some(15)).unwrap();
        assert!(together(worlds.clone(), asked).into_iter().all(|signal| signal == Some(15)));
        assert!(
            together(worlds, |world| world.any_signal(None).unwrap()).into_iter().all(|none| none.is_none())
        );
    }
}

#[test]
fn local_rows_follow_each_other_in_the_order_of_the_ranks() {
    for worlds in worlds() {
        for count in [0, 1, 4, 11] {
            let collected = together(worlds.clone(), |world| {
                let rows: Vec<f32> = world.local_rows(count).map(|row| row as f32).collect();
                world
                    .all_gather_tensor(Tensor::new(rows, &Device::Cpu).unwrap())
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
            });
            assert!(
                collected.iter().all(|rows| *rows == (0..count).map(|row| row as f32).collect::<Vec<_>>())
            );
        }
    }
}

#[test]
fn a_broadcast_gives_all_ranks_the_values_of_rank_0() {
    for worlds in worlds() {
        let found = together(worlds, |world| {
            let buffer = Tensor::full(world.rank() as f32, 5, &Device::Cpu).unwrap();
            world.broadcast(&buffer).unwrap();
            world.barrier().unwrap();
            (
                values(&buffer).unwrap(),
                world.broadcast_bytes(vec![world.rank() as u8; 1 + world.rank()]).unwrap(),
            )
        });
        assert!(found.iter().all(|found| *found == (vec![0.0; 5], vec![0])));
    }
}

#[test]
fn a_rank_with_another_digest_is_named() {
    for worlds in worlds().filter(|worlds| worlds.len() > 2) {
        let found = together(worlds, |world| {
            world.assert_same("model", 7).unwrap();
            world.assert_same("model", u64::from(world.rank() == 2)).unwrap_err().to_string()
        });
        assert!(found.iter().all(|message| message == "rank 2: has another model than rank 0"), "{found:?}");
    }
}

#[test]
fn different_collectives_on_two_ranks_are_an_error() {
    for worlds in worlds().filter(|worlds| worlds.len() > 1) {
        let found = together(worlds, |world| match world.rank() {
            1 => world.all_gather(&[1u8]).map(drop),
            _ => world.all_gather(&[1u64]).map(drop),
        });
        assert!(
            found[0]
                .as_ref()
                .unwrap_err()
                .to_string()
                .contains("rank 1: called another collective than rank 0")
        );
    }
}

#[test]
fn all_ranks_learn_why_one_has_failed() {
    for worlds in worlds().filter(|worlds| worlds.len() > 1) {
        let found = together(worlds, |world| {
            if world.rank() == 1 {
                world.abort(&Error::Usage("no memory".to_owned()), 7);
                return None;
            }
            let error = world.barrier().unwrap_err();
            // A rank that forwards the failure still names the first one.
            world.abort(&error, 1);
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
        // The links of rank 0 are closed when its thread ends.
        let found = together(worlds, |world| if world.is_rank_zero() { None } else { world.barrier().err() });
        for error in found.into_iter().flatten() {
            let message = error.to_string();
            assert!(message.contains("has ended without reporting an error"), "{message}");
        }
    }
}

#[test]
fn a_rank_that_hangs_is_named_after_the_timeout() {
    let address = rendezvous::host(("127.0.0.1", 0), 2, Token::new("of the tests")).unwrap();
    let quick = |rank| RankEnv { timeout: Duration::from_secs(2), ..env(rank, 2, address.port()) };
    let connect = |rank| tcp::connect(&quick(rank)).unwrap();
    let (mut first, _second) = thread::scope(|scope| {
        let other = scope.spawn(|| connect(1));
        (connect(0), other.join().unwrap())
    });
    heartbeat::record_work();
    // The other rank sends heartbeats, but its work count does not change, or hardly: it is that of this
    // process.
    first.timeout = Duration::from_millis(300);
    let world = World { rank: 0, size: 2, transport: Some(Arc::new(first)) };
    let message = world.barrier().unwrap_err().to_string();
    assert!(message.starts_with("rank 1: on 127.0.0.1 has made no progress"), "{message}");
}

/// Rank 0 of `others + 1`, whose peers never read.
fn unread(others: usize, timeout: Duration) -> (World, Vec<TcpStream>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (mut sockets, mut ends) = (vec![None], Vec::new());
    for _ in 0..others {
        ends.push(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        sockets.push(Some(listener.accept().unwrap().0));
    }
    let mesh = tcp::mesh(0, sockets, timeout).unwrap();
    (World { rank: 0, size: others + 1, transport: Some(Arc::new(mesh)) }, ends)
}

/// More bytes than the system buffers for a socket.
const LONG: usize = 64 << 20;

#[test]
fn a_sender_notices_a_lost_host_after_the_timeout() {
    let (world, _ends) = unread(1, Duration::from_secs(1));
    let start = Instant::now();
    let message = world.all_gather(&vec![0u8; LONG]).unwrap_err().to_string();
    assert!(message.starts_with("rank 1: on 127.0.0.1 has made no progress for 1 s"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // After half a frame no failure message follows: the receiver would take it for the rest of the frame.
    let start = Instant::now();
    world.abort(&Error::Usage("no memory".to_owned()), 1);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_blocked_sender_learns_that_another_rank_failed() {
    let (world, mut ends) = unread(2, Duration::from_secs(600));
    let failure = [&2u32.to_le_bytes()[..], &[7], b"no memory"].concat();
    let frame = [&1u64.to_le_bytes()[..], &(failure.len() as u64).to_le_bytes(), &failure].concat();
    std::io::Write::write_all(&mut ends[1], &frame).unwrap();
    let error = world.all_gather(&vec![0u8; LONG]).unwrap_err();
    assert!(matches!(error, Error::Rank { rank: 2, status: 7, .. }), "{error:?}");
}

#[test]
fn ranks_of_one_host_accept_no_connections_from_outside() {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let env = |rank| RankEnv { hosted: false, secret: None, ..env(rank, 2, port) };
    let connect = |rank| tcp::connect(&env(rank)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| connect(1));
        connect(0);
    });
    let free = |address| TcpListener::bind((address, port)).is_ok();
    assert!(free("127.0.0.2") && !free("127.0.0.1"));
}

#[test]
fn a_process_without_the_token_is_rejected_and_disturbs_nobody() {
    let address = rendezvous::host(("127.0.0.1", 0), 2, Token::new("of the tests")).unwrap();
    let stranger = RankEnv { secret: Some("guessed".to_owned()), ..env(1, 2, address.port()) };
    let message = tcp::connect(&stranger).unwrap_err().to_string();
    assert!(message.contains("LODESTONE_TOKEN differs"), "{message}");
    // A process that sends nothing, and one that sends garbage.
    let _silent = TcpStream::connect(address).unwrap();
    std::io::Write::write_all(&mut TcpStream::connect(address).unwrap(), &[7; 200]).unwrap();
    let wrong = RankEnv { size: 3, local_size: 3, ..env(2, 3, address.port()) };
    let message = tcp::connect(&wrong).unwrap_err().to_string();
    assert!(message.contains("this is rank 2 of 3, but 2 ranks are expected"), "{message}");
    // A rank that joined and left before all had come.
    let early = RankEnv { timeout: Duration::from_secs(1), ..env(0, 2, address.port()) };
    let message = tcp::connect(&early).unwrap_err().to_string();
    assert!(message.contains("rank 1 did not come within 1 s") || message.contains("no answer"), "{message}");

    let connect = |rank| World {
        rank,
        size: 2,
        transport: Some(Arc::new(tcp::connect(&env(rank, 2, address.port())).unwrap())),
    };
    let worlds = thread::scope(|scope| {
        let other = scope.spawn(|| connect(1));
        vec![connect(0), other.join().unwrap()]
    });
    together(worlds, |world| world.barrier().unwrap());
}

#[test]
fn a_missing_rendezvous_is_an_error_that_names_its_address() {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let env = RankEnv { timeout: Duration::from_millis(200), ..env(1, 2, port) };
    let message = tcp::connect(&env).unwrap_err().to_string();
    assert!(message.contains(&format!("cannot reach 127.0.0.1:{port}")), "{message}");
}
