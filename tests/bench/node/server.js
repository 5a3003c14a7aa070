// node server.js express|fastify|work: two processes on one port, which is printed as soon as both serve.
import cluster from "node:cluster";

const PROCESSES = 2;

if (cluster.isPrimary) {
  let serving = 0;
  cluster.on("listening", (_worker, address) => {
    serving += 1;
    if (serving === PROCESSES) {
      console.log(`ready ${address.port}`);
    }
  });
  cluster.on("exit", (_worker, code) => process.exit(code || 1));
  for (let n = 0; n < PROCESSES; n += 1) {
    cluster.fork();
  }
} else {
  const { listen } = await import(`./${process.argv[2]}.js`);
  await listen(0, "127.0.0.1");
}
