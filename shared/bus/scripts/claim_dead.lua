-- Claim the pending entries of consumers whose lease has expired, and delete those consumers when they own nothing.
-- A replica that is starting has read nothing yet: entries pending under its name were left by its former process. A
-- replica whose lease cannot be read is alive.
-- KEYS: stream
-- ARGV: consumer group, consumer, prefix of lease keys, most entries to claim
-- Returns {{entry id, attempts, fields}..., number of entries of dead consumers that are left}.
-- requires: claim_entries
local taken, left, room = {}, 0, tonumber(ARGV[4])
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers.err then return {taken, left} end
for _, consumer in ipairs(consumers) do
  local name, pending = consumer[2], consumer[4]
  local lease = redis.call('GET', ARGV[3] .. name)
  local readable, status = pcall(cjson.decode, lease or '')
  local starting = readable and type(status) == 'table' and status.state == 'starting'
  if name ~= ARGV[2] and (not lease or starting) then
    local before = #taken
    if pending > 0 and before < room then
      claim_entries(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', room - before, name), taken)
    end
    local rest = pending - (#taken - before)
    if rest == 0 and not lease then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name) end
    left = left + rest
  end
end
return {taken, left}
