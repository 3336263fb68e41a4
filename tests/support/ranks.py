"""Several processes joined by gloo, each running one function of a test."""

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SERVER = multiprocessing.get_context("forkserver")  # ranks start with everything imported
SERVER.set_forkserver_preload(["training_arb.optim.integer_optimizer", "training_arb.memory.state_audit", __name__])


def on_ranks(ranks, work, folder, *arguments):
    """Run work(rank, *arguments) in `ranks` processes joined by gloo; returns what each returned."""
    queue = SERVER.SimpleQueue()
    processes = [SERVER.Process(target=_rank, args=(work, r, ranks, folder, queue, arguments)) for r in range(ranks)]
    for process in processes:
        process.start()
    answers = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
    assert all(not isinstance(answer, Exception) for answer in answers.values()), answers
    return [answers[rank] for rank in range(ranks)]


def _rank(work, rank, ranks, folder, queue, arguments):
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        queue.put((rank, work(rank, *arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        queue.put((rank, RuntimeError(repr(error))))
