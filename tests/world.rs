//! The number of ranks does not change the result of training.

use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::thread;

use candle_core::Tensor;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tests::{golden, metrics, model_folder, program, relative_error, stderr, write_config};
use trainer::comm::World;
use trainer::config::{self, Distance, LossKind};
use trainer::data::batch::{Batch, CsrIndices, Cursor, LossTable, RowId, Sequence};
use trainer::loss::{InfoNce, Kl, Losses, Matryoshka, Triplet};
use trainer::model::chunk::Limit;
use trainer::model::{Model, ModelFolder, Options};
use trainer::train::gradcache::Budget;
use trainer::train::setup::StepSettings;
use trainer::train::step::Stepper;

/// Settings of a run.
#[derive(Clone, Debug)]
struct Setup {
    name: &'static str,
    adapted: bool,
    losses: Losses,
    chunk: Limit,
    steps: u64,
}

/// Results of a run: the loss of each row and the gradient norm of every step, the first gradient, the last
/// parameters.
struct Trained {
    losses: Vec<Vec<f32>>,
    norms: Vec<f64>,
    gradient: Tensor,
    parameters: Tensor,
}

/// A batch with InfoNCE. Its rows share texts as queries, positives and negatives; they have different
/// numbers of negatives, some of them excluded, and texts of 1 to 60 tokens.
fn batch(rows: usize, seed: u64) -> Batch {
    batch_of(rows, seed, &[LossKind::InfoNce])
}

/// The same with several losses, one of them for each row.
fn batch_of(rows: usize, seed: u64, losses: &[LossKind]) -> Batch {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let texts = rows + random.random_range(2..=2 * rows);
    let sequences: Vec<Sequence> = (0..texts)
        .map(|_| {
            let length = random.random_range(1..=60);
            Sequence { ids: (0..length).map(|_| random.random_range(5..85)).collect(), skip: 0 }
        })
        .collect();
    let of_row: Vec<usize> = (0..rows).map(|_| random.random_range(0..losses.len())).collect();
    let tables = losses
        .iter()
        .enumerate()
        .map(|(i, &loss)| {
            let rows = (0..rows as u32).filter(|&row| of_row[row as usize] == i).collect();
            table(rows, loss, texts, &mut random)
        })
        .collect();
    let rows = (0..rows as u64).map(|row| RowId { dataset: 0, row }).collect();
    Batch { sequences, tables, rows, cursor: Cursor::default(), epoch: 1.0 }
}

fn table(rows: Vec<u32>, loss: LossKind, texts: usize, random: &mut ChaCha8Rng) -> LossTable {
    let count = rows.len();
    let mut text = || random.random_range(0..texts) as u32;
    let queries: Vec<u32> = (0..count).map(|_| text()).collect();
    let mut candidates: Vec<u32> = (0..count).map(|_| text()).collect();
    let mut own: Vec<Vec<u32>> = (0..count as u32).map(|row| vec![row]).collect();
    for own in own.iter_mut().filter(|_| loss != LossKind::CoSent) {
        // Only InfoNCE can learn from a row without negatives.
        let least = u32::from(loss != LossKind::InfoNce);
        for _ in 0..least + text() % 4 {
            own.push(candidates.len() as u32);
            candidates.push(text());
        }
    }
    let excluded: Vec<Vec<u32>> = (0..count as u32)
        .map(|row| (0..candidates.len() as u32).filter(|&column| column != row && text() % 9 == 0).collect())
        .collect();
    let lists = |rows: Vec<Vec<u32>>| {
        let mut lists = CsrIndices { offsets: vec![0], columns: Vec::new() };
        for row in rows {
            lists.columns.extend(row);
            lists.offsets.push(lists.columns.len() as u32);
        }
        lists
    };
    let own = lists(own);
    // Only five different scores, so that some are equal.
    let scores = own.columns.iter().map(|_| (text() % 5) as f32 / 4.0).collect();
    let positives = (0..count as u32).collect();
    LossTable { loss, rows, queries, candidates, positives, excluded: lists(excluded), own, scores }
}

/// Trains one rank; `batch` gives the batch of each step.
fn train(setup: &Setup, world: World, batch: impl Fn(u64) -> Batch) -> Trained {
    let folder = model_folder(setup.name, false);
    let section = config::Model { dropout: Some(0.1), ..config::Model::default() };
    let lora = config::Lora { dropout: Some(0.1), ..config::Lora::default() };
    let lora = setup.adapted.then_some(&lora);
    let options = Options { model: section, lora, trained: true, seed: 7, shapes_only: false };
    let model = Model::open(ModelFolder::open(folder.path()).unwrap(), &options).unwrap();
    let training =
        config::Training { learning_rate: 1e-3, warmup_steps: Some(5), ..config::Training::default() };
    let settings = StepSettings {
        training: &training,
        loss: &config::Loss::default(),
        seed: 3,
        steps: setup.steps.max(6),
        budget: Budget { chunk: setup.chunk, activation_memory: u64::MAX },
    };
    let stepper = Stepper::new(&model, &settings, world).unwrap();
    let mut stepper = Stepper { losses: setup.losses.clone(), ..stepper };
    let (mut losses, mut norms, mut gradient) = (Vec::new(), Vec::new(), None);
    for step in 1..=setup.steps {
        let outcome = stepper.step(&batch(step), step).unwrap();
        assert!(outcome.applied);
        losses.push(outcome.losses);
        norms.push(outcome.grad_norm);
        gradient.get_or_insert(stepper.gradients.flat().copy().unwrap());
    }
    Trained { losses, norms, gradient: gradient.unwrap(), parameters: model.flat().values().copy().unwrap() }
}

/// Trains on several ranks, checks that all have the same bits, and returns the results of rank 0.
fn on(ranks: usize, setup: &Setup, batch: impl Fn(u64) -> Batch + Sync) -> Trained {
    let batch = &batch;
    let mut trained: Vec<Trained> = thread::scope(|scope| {
        let ranks: Vec<_> = World::threads(ranks)
            .into_iter()
            .map(|world| scope.spawn(move || train(setup, world, batch)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let bits = |trained: &Trained| (trained.losses.clone(), trained.parameters.to_vec1::<f32>().unwrap());
    assert!(trained.windows(2).all(|two| bits(&two[0]) == bits(&two[1])), "{ranks} ranks have drifted apart");
    trained.swap_remove(0)
}

/// Relative tolerance for f32 sums of some thousand terms in another order.
const CLOSE: f64 = 1e-5;

fn compare(some: &Trained, one: &Trained, what: &str) {
    for (step, (a, b)) in some.losses.iter().zip(&one.losses).enumerate() {
        assert_eq!(a.len(), b.len());
        for (row, (a, b)) in a.iter().zip(b).enumerate() {
            let error = f64::from((a - b).abs() / b.abs().max(1e-2));
            assert!(error < CLOSE, "{what}: row {row} of step {}: {a} and {b}", step + 1);
        }
    }
    for (a, b) in some.norms.iter().zip(&one.norms) {
        assert!((a - b).abs() <= 1e-4 * b, "{what}: gradient norms {a} and {b}");
    }
    let error = relative_error(&some.gradient, &one.gradient);
    assert!(error < CLOSE, "{what}: gradients differ by {error:e}");
}

fn info_nce() -> Losses {
    Losses {
        info_nce: InfoNce {
            temperature: 0.05,
            in_batch_negatives: true,
            symmetric: false,
            false_negative_margin: None,
        },
        ..Losses::default()
    }
}

#[test]
fn fifty_steps_have_the_losses_of_one_rank() {
    for (name, adapted) in [("bert", true), ("mistral", true), ("bert", false)] {
        let setup = Setup { name, adapted, losses: info_nce(), chunk: Limit::Tokens(128), steps: 50 };
        let batches = |step| batch(8, step);
        let one = on(1, &setup, batches);
        for ranks in [2, 3, 4] {
            let some = on(ranks, &setup, batches);
            compare(&some, &one, &format!("{name} on {ranks} ranks"));
            // AdamW makes full steps for gradients that are only rounding errors, such as those of
            // the key biases.
            let close = if adapted { CLOSE } else { 1e-3 };
            let error = relative_error(&some.parameters, &one.parameters);
            assert!(error < close, "{name} on {ranks} ranks: parameters differ by {error:e}");
        }
    }
}

#[test]
fn random_batches_on_several_ranks_give_the_step_of_one_rank() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for case in 0..40 {
        let rows = random.random_range(1..=12);
        let ranks = random.random_range(2..=9);
        let loss = InfoNce {
            temperature: 0.05,
            in_batch_negatives: random.random_bool(0.7),
            symmetric: random.random_bool(0.4),
            false_negative_margin: random.random_bool(0.3).then_some(0.3),
        };
        let symmetric = loss.symmetric && loss.in_batch_negatives;
        let setup = Setup {
            name: if case % 4 == 0 { "mistral" } else { "bert" },
            adapted: case % 3 == 0,
            losses: Losses { info_nce: InfoNce { symmetric, ..loss }, ..Losses::default() },
            chunk: [Limit::Tokens(1), Limit::Tokens(100), Limit::Sequences(3)][case % 3],
            steps: 1,
        };
        let batches = |_| batch(rows, 1000 + case as u64);
        compare(
            &on(ranks, &setup, batches),
            &on(1, &setup, batches),
            &format!("case {case}: {ranks} ranks, {setup:?}"),
        );
    }
}

#[test]
fn every_loss_has_the_step_of_one_rank() {
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let distances = [Distance::Cosine, Distance::Euclidean, Distance::Manhattan];
    for case in 0..24 {
        let alone =
            [LossKind::InfoNce, LossKind::Triplet, LossKind::CoSent, LossKind::MarginMse, LossKind::Kl];
        // First each loss alone, then all in one batch.
        let kinds = alone.get(case..=case).unwrap_or(&alone);
        let rows = random.random_range(5..=16);
        let ranks = random.random_range(2..=5);
        let dims = vec![(16, 1.0), (8, 0.5), (3, 0.25)];
        let losses = Losses {
            triplet: Triplet { distance: distances[case % 3], margin: 0.5 },
            kl: Kl { temperature: 0.2, teacher_temperature: 1.0 },
            matryoshka: (case % 2 == 1).then_some(Matryoshka { dims }),
            ..info_nce()
        };
        let setup =
            Setup { name: "bert", adapted: case % 4 == 0, losses, chunk: Limit::Tokens(100), steps: 1 };
        let batches = |_| batch_of(rows, 2000 + case as u64, kinds);
        let one = on(1, &setup, batches);
        assert!(one.norms[0] > 0.0, "case {case} has no gradient");
        compare(
            &on(ranks, &setup, batches),
            &one,
            &format!("case {case}: {ranks} ranks, {kinds:?}, {setup:?}"),
        );
    }
}

#[test]
fn more_ranks_than_sequences_give_the_same_step() {
    let setup =
        Setup { name: "bert", adapted: false, losses: info_nce(), chunk: Limit::Tokens(64), steps: 2 };
    let tiny = |_| {
        let sequences = vec![Sequence { ids: vec![5, 6], skip: 0 }, Sequence { ids: vec![7], skip: 0 }];
        let lists = CsrIndices { offsets: vec![0, 0], columns: vec![] };
        let own = CsrIndices { offsets: vec![0, 1], columns: vec![0] };
        let mut tables = batch(1, 0).tables;
        tables[0] = LossTable {
            queries: vec![0],
            candidates: vec![1],
            positives: vec![0],
            excluded: lists,
            own,
            ..tables[0].clone()
        };
        Batch { sequences, tables, ..batch(1, 0) }
    };
    let one = train(&setup, World::solo(), tiny);
    let some = on(5, &setup, tiny);
    // A row without negatives has a loss and a gradient of zero.
    assert_eq!((&some.losses, &some.norms), (&one.losses, &one.norms));
}

#[test]
fn one_rank_with_a_transport_is_like_one_without() {
    let setup = Setup { name: "bert", adapted: true, losses: info_nce(), chunk: Limit::Tokens(64), steps: 3 };
    let (alone, among) =
        (train(&setup, World::solo(), |step| batch(5, step)), on(1, &setup, |step| batch(5, step)));
    assert_eq!(alone.losses, among.losses);
    assert_eq!(alone.parameters.to_vec1::<f32>().unwrap(), among.parameters.to_vec1::<f32>().unwrap());
}

/// Trains with two processes in the environment of a starter other than `launch`, and waits for their
/// success.
fn processes(environment: impl Fn(usize) -> Vec<(&'static str, String)>, config: &Path) {
    let start = |rank: usize| {
        let mut command = program("trainer");
        command.args(["train", "--quiet"]).arg(config).envs(environment(rank));
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for child in (0..2).map(start).collect::<Vec<_>>() {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
}

fn losses(config: &Path) -> Vec<f64> {
    metrics(&config.with_file_name("out")).iter().filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
fn ranks_find_each_other_in_the_environments_of_torchrun_and_srun() {
    let place = tempfile::tempdir().unwrap();
    let config = |name: &str| {
        let folder = place.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let rows = golden("bert").join("rows.jsonl");
        write_config(&folder, &tests::config(&golden("bert"), &rows, &folder.join("out")))
    };
    let port = || TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port().to_string();
    let one = config("one");
    assert!(program("trainer").args(["train", "--quiet"]).arg(&one).status().unwrap().success());

    let (torchrun, free) = (config("torchrun"), port());
    let variables = |rank: usize| {
        let rank = rank.to_string();
        let two = "2".to_owned();
        vec![
            ("RANK", rank.clone()),
            ("WORLD_SIZE", two.clone()),
            ("LOCAL_RANK", rank),
            ("LOCAL_WORLD_SIZE", two),
            ("MASTER_ADDR", "localhost".to_owned()),
            ("MASTER_PORT", free.clone()),
        ]
    };
    processes(variables, &torchrun);
    let (srun, free) = (config("srun"), port());
    let variables = |rank: usize| {
        vec![
            ("SLURM_PROCID", rank.to_string()),
            ("SLURM_LOCALID", rank.to_string()),
            ("SLURM_NODEID", "0".to_owned()),
            ("SLURM_STEP_NUM_TASKS", "2".to_owned()),
            // Variables of SLURM's plugin pmi2, which are set for all programs.
            ("PMI_RANK", rank.to_string()),
            ("PMI_SIZE", "2".to_owned()),
            ("SLURM_STEP_TASKS_PER_NODE", "2".to_owned()),
            ("SLURM_STEP_NODELIST", "n1".to_owned()),
            ("MASTER_ADDR", "n1".to_owned()),
            ("MASTER_PORT", free.clone()),
        ]
    };
    processes(variables, &srun);
    for some in [&torchrun, &srun] {
        assert_eq!(losses(some).len(), losses(&one).len());
        for (a, b) in losses(some).iter().zip(losses(&one)) {
            assert!((a - b).abs() < 1e-5 * b.abs().max(0.1), "{a} and {b}");
        }
    }
}
