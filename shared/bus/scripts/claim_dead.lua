-- Claim the pending entries of consumers whose lease has expired, and delete those consumers when they own nothing.
-- A replica that is starting has read nothing yet: entries pending under its name were left by its former process. A
-- replica whose lease cannot be read is alive.
-- What is pending for newer replicas is claimed by one that reads it, or if no living one does.
-- KEYS: stream, index of the service's replicas
-- ARGV: consumer group, consumer, prefix of lease keys, most entries to claim, consumer that stands for newer replicas,
-- newest version that the consumer reads, consumer that stands for what waits for its turn
-- Returns {{entry id, attempts, fields}..., number of entries of dead consumers that are left, number that wait}.
-- requires: claim_entries
-- requires: newest_reader
-- requires: lease_of
local function ours(pending)
  local newest, found = newest_reader(KEYS[2], ARGV[3]), {}
  for _, entry in ipairs(pending) do
    local read = redis.call('XRANGE', KEYS[1], entry[1], entry[1])[1]
    local version = read and tonumber(read[2][2]) or 0
    if version <= tonumber(ARGV[6]) or version > newest then found[#found + 1] = entry end
  end
  return found
end

local taken, left, waiting, room = {}, 0, 0, tonumber(ARGV[4])
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers.err then return {taken, left, waiting} end
for _, consumer in ipairs(consumers) do
  local name, pending = consumer[2], consumer[4]
  local lease = lease_of(ARGV[3] .. name)
  local readable, status = pcall(cjson.decode, lease or '')
  local starting = readable and type(status) == 'table' and status.state == 'starting'
  if name == ARGV[7] then
    waiting = pending
    if pending == 0 then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name) end
  elseif name ~= ARGV[2] and (not lease or starting) then
    local before = #taken
    if pending > 0 and before < room then
      local entries = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', room - before, name)
      claim_entries(name == ARGV[5] and ours(entries) or entries, taken)
    end
    local rest = pending - (#taken - before)
    if rest == 0 and not lease then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name) end
    if name ~= ARGV[5] then left = left + rest end
  end
end
return {taken, left, waiting}
